// Scores with their errors, and two evaluations compared problem by problem.

const percent = (share, digits = 1) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)} %`);
const signed = (share) => `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)} %`;

function showEvaluations() {
  const { scores, comparisons } = DATA.evaluations;
  if (!scores.length) return section("evaluations").remove();
  const rows = scores.map((s) => [runName(s.run), s.benchmark, `${percent(s.accuracy)} ± ${percent(s.standard_error)}`,
    number(s.samples_per_problem), number(s.problems), s.pass_at_k.map(([k, share]) => `@${k} ${percent(share)}`).join("  "),
    percent(s.majority), percent(s.formatted), percent(s.truncated), number(s.length_mean)]);
  section("evaluations").append(
    note("The error is the standard error of the mean over problems."),
    table(["run", "benchmark", "accuracy", "samples", "problems", "pass@k", "majority", "well-formed", "truncated", "tokens"], rows));
  if (comparisons.length) section("evaluations").append(comparisonPanel(comparisons));
}

function comparisonPanel(comparisons) {
  const title = (c) => `${c.benchmark}: ${DATA.runs[c.a].name} → ${DATA.runs[c.b].name}`;
  const place = el("div");
  const select = el("select", { onchange: () => show(comparisons[select.value]) },
    ...comparisons.map((c, i) => el("option", { value: i }, title(c))));
  function show(c) {
    const p = c.p_value < 0.0001 ? "p < 0.0001" : `p = ${c.p_value.toFixed(4)}`;
    const rows = c.problems.map((problem) => [problem.text, percent(problem.a, 0), percent(problem.b, 0), signed(problem.b - problem.a)]);
    place.replaceChildren(
      note(`Accuracy ${signed(c.difference)} ± ${percent(c.standard_error)} in a paired test (${p}): better on ${c.better} problems, worse on ${c.worse}, the same on ${c.unchanged}. The problems that changed most:`),
      table(["problem", DATA.runs[c.a].name, DATA.runs[c.b].name, "difference"], rows, [0], "tall"));
  }
  show(comparisons[0]);
  return el("details", { open: "" }, el("summary", {}, "Problem by problem"), el("div", { class: "controls" }, select), place);
}
