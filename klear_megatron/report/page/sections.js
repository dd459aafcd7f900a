// The runs, the account, curves, seconds, distributions, and pictures.

const KINDS = { rl: "RL", sft: "SFT" };
const GROUPS = ["reward", "response", "train", "rollout", "evaluation", "throughput"];
// Shares of a step that lie inside its phases or beside them.
const NO_PHASES = ["seconds/total", "seconds/trainer_idle", "seconds/servers_idle"];
let smoothing = 0;

function showRuns() {
  const rows = DATA.runs.map((run, i) => [runName(i), run.kind, number(run.steps), run.model, run.folder]);
  section("runs").append(table(["run", "kind", "steps", "model", "folder"], rows, [1, 3, 4], "runs"));
  for (const text of DATA.notes) section("runs").append(note(text));
  if (DATA.differences.length) {
    const different = DATA.differences.map(({ key, values }) => [key, ...values]);
    section("runs").append(el("details", { open: "" }, el("summary", {}, "Settings that differ"),
      table(["setting", ...DATA.runs.map((_, i) => runName(i))], different)));
  }
}

function showAccount() {
  if (!DATA.account.rows.length) return section("account").remove();
  section("account").append(table(DATA.account.head, DATA.account.rows.map(([i, ...values]) => [i === null ? "together" : runName(i), ...values.map(number)]), [1]),
    el("details", {}, el("summary", {}, "What is counted"), note(DATA.account.note)));
}

// The exponential mean of TensorBoard, without its pull towards the first value.
function smooth(values) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = sum * smoothing + value;
    weight = weight * smoothing + 1;
    return sum / weight;
  });
}

// Runs are overlaid with others of their kind: a step of SFT is no step of RL.
function curveTraces(kind, metric) {
  const traces = [];
  DATA.runs.forEach((run, i) => {
    const curve = run.kind === kind && run.curves[metric];
    if (!curve) return;
    const [steps, values] = curve, sparse = steps.length < 30;
    const line = { color: colorOf(i), width: 1.6 };
    if (smoothing > 0) traces.push({ x: steps, y: values, line, opacity: 0.22, hoverinfo: "skip", mode: "lines" });
    traces.push({ x: steps, y: smooth(values), line, name: run.name, mode: sparse ? "lines+markers" : "lines",
      marker: { size: 5 }, hovertemplate: "%{y:.5g}" });
  });
  return { traces };
}

function showCurves() {
  const kinds = Object.keys(KINDS).filter((kind) => DATA.runs.some((run) => run.kind === kind && run.steps !== null));
  if (!kinds.length) return section("curves").remove();
  const shown = el("output", {}, "0");
  const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, id: "smoothing",
    oninput: () => { smoothing = Number(slider.value); shown.value = slider.value; redraw(); } });
  section("curves").append(el("div", { class: "controls" }, el("label", {}, "smoothing", slider, shown)));
  for (const kind of kinds) showCurvesOf(kind);
}

// The value that a metric has at every step of every run; undefined if it moves.
function constant(kind, metric) {
  const values = new Set(DATA.runs.filter((run) => run.kind === kind && run.curves[metric]).flatMap((run) => run.curves[metric][1]));
  return values.size === 1 ? [...values][0] : undefined;
}

function showCurvesOf(kind) {
  const runs = DATA.runs.map((run, i) => [run, i]).filter(([run]) => run.kind === kind);
  const names = [...new Set(runs.flatMap(([run]) => Object.keys(run.curves)))].filter((name) => !name.startsWith("seconds/"));
  const groupOf = (name) => name.split("/")[0];
  for (const group of new Set([...GROUPS, ...names.map(groupOf)])) {
    const members = names.filter((name) => groupOf(name) === group);
    if (!members.length) continue;
    const title = (name) => name.slice(group.length + 1) || name;
    const still = new Map(members.map((name) => [name, constant(kind, name)]).filter(([, value]) => value !== undefined));
    const moving = members.filter((name) => !still.has(name));
    section("curves").append(
      el("h3", { class: "controls" }, `${KINDS[kind]}: ${group}`, ...runs.map(([, i]) => runName(i))),
      el("div", { class: "grid" }, ...moving.map((name) => chart(title(name), () => curveTraces(kind, name)))));
    if (still.size) section("curves").append(
      note(`The same at every step: ${[...still].map(([name, value]) => `${title(name)} ${number(value)}`).join(", ")}.`));
  }
}

function phaseTraces(run) {
  const phases = Object.keys(run.curves).filter((name) => name.startsWith("seconds/") && !NO_PHASES.includes(name));
  const [steps, total] = run.curves["seconds/total"];
  const rest = new Map(steps.map((step, i) => [step, total[i]]));
  const traces = phases.map((name, i) => {
    const [x, y] = run.curves[name];
    if (name !== "seconds/save") // it comes after the total
      x.forEach((step, j) => rest.has(step) && rest.set(step, rest.get(step) - y[j]));
    return { x, y, name: name.slice("seconds/".length), type: "bar", marker: { color: colorOf(i) }, hovertemplate: "%{y:.2f} s" };
  });
  const other = steps.map((step) => Math.max(0, rest.get(step)));
  traces.push({ x: steps, y: other, name: "other", type: "bar", marker: { color: "#cbd5e1" }, hovertemplate: "%{y:.2f} s" });
  return { traces, layout: { barmode: "stack", bargap: 0, showlegend: true, legend: { orientation: "h", y: 1.12 },
    margin: { l: 52, r: 10, t: 30, b: 34 }, xaxis: { title: { text: "step" } }, yaxis: { title: { text: "seconds" } } } };
}

function showTime() {
  const timed = DATA.runs.filter((run) => run.curves["seconds/total"]);
  if (!timed.length) return section("time").remove();
  section("time").append(el("div", { class: "grid wide" }, ...timed.map((run) => chart(run.name, () => phaseTraces(run)))));
}

function heatmap({ steps, edges, shares }, unit) {
  const middles = edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
  const z = middles.map((_, bin) => shares.map((row) => row[bin]));
  const trace = { type: "heatmap", x: steps, y: middles, z, colorscale: [[0, "#ffffff"], [0.25, "#bfd3ff"], [1, "#1e3a8a"]],
    colorbar: { thickness: 8, tickformat: ".0%" }, hovertemplate: `step %{x}<br>${unit} about %{y:.4g}<br>%{z:.1%} of the responses<extra></extra>` };
  return { traces: [trace], layout: { hovermode: "closest", xaxis: { title: { text: "step" } }, yaxis: { title: { text: unit } } } };
}

function showDistributions() {
  const drawn = DATA.runs.filter((run) => run.distributions);
  if (!drawn.length) return section("distributions").remove();
  const cards = drawn.flatMap((run) => [
    chart(`${run.name}: length of responses`, () => heatmap(run.distributions.tokens, "tokens")),
    chart(`${run.name}: reward`, () => heatmap(run.distributions.reward, "reward")),
  ]);
  section("distributions").append(note("The share of a step's responses in each bin."), el("div", { class: "grid wide" }, ...cards));
}

// What scaling experiments and probes have drawn themselves.
function showPictures() {
  const drawn = DATA.runs.filter((run) => run.pictures.length);
  if (!drawn.length) return section("pictures").remove();
  for (const run of drawn) section("pictures").append(el("h3", {}, run.name),
    ...run.pictures.map((src) => el("div", { class: "scroll" }, el("img", { src, alt: `${run.kind} of ${run.name}` }))));
}
