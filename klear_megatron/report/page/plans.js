// Plans: memory and seconds by kind, and what was measured beside them.

function showPlans() {
  const { plans, steps } = DATA.plans;
  if (!plans.length) return section("plans").remove();
  const sum = (kinds) => Object.values(kinds).reduce((a, b) => a + b, 0);
  const rows = plans.map((p, i) => [runName(p.run), `${i + 1}: ${p.layout}`, number(sum(p.gib)), p.fits ? "yes" : "no",
    number(sum(p.seconds)), number(p.speed), percent(p.mfu)]);
  section("plans").append(
    note("Of the rank that needs the most memory, and of one optimizer step. The plan of a run is for sequences as long as it allows."),
    table(["run", "layout", "GiB", "fits", "seconds", "tokens/s per GPU", "MFU"], rows, [1]),
    el("div", { class: "grid wide below" },
      chart("memory by kind, GiB", () => kindTraces(plans, "gib", "GiB")),
      chart("optimizer step by kind, seconds", () => kindTraces(plans, "seconds", "s"))));
  if (steps.length) section("plans").append(
    el("h3", {}, "First steps of runs, planned for their own sequences and measured"),
    table(["run", "step after the start", "seconds of training: planned", "measured", "peak GiB: planned", "measured"],
      steps.map((s) => [runName(s.run), s.step_of_start, number(s.planned.seconds), number(s.measured.seconds),
        number(s.planned.gib), number(s.measured.gib)])));
}

// One bar for each plan, stacked by kind; kinds that are nowhere above zero are left out.
function kindTraces(plans, of, unit) {
  const kinds = [...new Set(plans.flatMap((p) => Object.keys(p[of])))].filter((kind) => plans.some((p) => p[of][kind] > 0));
  const traces = kinds.map((kind, i) => ({ type: "bar", orientation: "h", name: kind, x: plans.map((p) => p[of][kind] ?? 0),
    y: plans.map((_, j) => j), marker: { color: colorOf(i) }, hovertemplate: `%{x:.4g} ${unit}` }));
  return { traces, layout: { barmode: "stack", hovermode: "y unified", showlegend: true, bargap: 0.35,
    height: 170 + 20 * plans.length, legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, margin: { l: 30, r: 10, t: 110, b: 34 },
    yaxis: { autorange: "reversed", tickvals: plans.map((_, j) => j), ticktext: plans.map((_, j) => String(j + 1)) } } };
}
