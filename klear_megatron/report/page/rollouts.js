// A browser of rollouts. Only the rows that can be seen exist, so 10,000 of them stay smooth.

const ROW_HEIGHT = 30;
// As rollouts/ has it: 1 is clipped below, 2 above.
const CLIPPED = ["", ["low", "below"], ["high", "above"]];

async function readRollouts() {
  const packed = document.getElementById("rollout-data").textContent;
  if (!packed) return [];
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function showRollouts() {
  const all = await readRollouts();
  if (!all.length) return section("rollouts").remove();
  const list = el("div", { class: "list", tabindex: 0 });
  const detail = el("div", { class: "detail" });
  const count = el("output", {});
  let rows = all, chosen = null;

  const head = el("div", { class: "row head" }, ...["run", "step", "source", "reward", "tokens"].map((name) => el("span", {}, name)));
  const canvas = el("div", { style: "position:relative" });
  list.append(head, canvas);

  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 5);
    const last = Math.min(rows.length, first + Math.ceil(list.clientHeight / ROW_HEIGHT) + 10);
    canvas.replaceChildren(...rows.slice(first, last).map((row, i) => rowElement(row, first + i)));
  }
  function rowElement(row, place) {
    const values = [DATA.runs[row.run].name, row.step, row.source, number(row.reward), row.tokens];
    return el("div", { class: row === chosen ? "row chosen" : "row", style: `top:${place * ROW_HEIGHT}px`, onclick: () => choose(row) },
      ...values.map((value, i) => el("span", { class: i === 3 ? (row.correct ? "right" : "wrong") : null }, String(value))));
  }
  function choose(row) {
    chosen = row;
    draw();
    if (row) showDetail(row, detail);
    else detail.replaceChildren(note("No response passes the filters."));
  }
  function filter() {
    rows = all.filter(passes);
    count.value = `${rows.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} responses`;
    canvas.style.height = `${rows.length * ROW_HEIGHT}px`;
    list.scrollTop = 0;
    choose(rows[0] ?? null);
  }
  list.addEventListener("scroll", draw);
  list.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const next = by && rows[rows.indexOf(chosen) + by];
    if (!next) return;
    event.preventDefault();
    choose(next);
    const top = rows.indexOf(next) * ROW_HEIGHT;
    if (top < list.scrollTop || top > list.scrollTop + list.clientHeight - 2 * ROW_HEIGHT) list.scrollTop = top - list.clientHeight / 2;
  });
  const { controls, passes } = filters(all, filter);
  section("rollouts").append(note(DATA.rollout_note), el("div", { class: "controls" }, ...controls, count), el("div", { class: "browser" }, list, detail));
  filter();
}

function filters(all, changed) {
  const choices = (name, values) => el("select", { id: `filter-${name}`, onchange: changed }, el("option", { value: "" }, "all"),
    ...values.map(([value, text]) => el("option", { value }, text)));
  const bound = (name) => el("input", { type: "number", step: "any", id: `filter-${name}`, oninput: changed });
  const distinct = (name) => [...new Set(all.map((row) => row[name]))];
  const run = choices("run", distinct("run").map((i) => [i, DATA.runs[i].name]));
  const source = choices("source", distinct("source").map((name) => [name, name]));
  const correct = choices("correct", [["true", "right"], ["false", "wrong"]]);
  const [low, high, least, most] = ["step-from", "step-to", "reward-from", "reward-to"].map(bound);
  const text = el("input", { type: "search", placeholder: "text", id: "filter-text", oninput: changed });
  const within = (value, from, to) => (from.value === "" || value >= Number(from.value)) && (to.value === "" || value <= Number(to.value));
  const passes = (row) =>
    (run.value === "" || row.run === Number(run.value)) && (source.value === "" || row.source === source.value)
    && (correct.value === "" || String(row.correct) === correct.value)
    && within(row.step, low, high) && within(row.reward, least, most)
    && (text.value === "" || row.response.includes(text.value) || row.prompt.some(([, content]) => content.includes(text.value)));
  const label = (name, ...inputs) => el("label", {}, name, ...inputs);
  const controls = [label("run", run), label("source", source), label("answer", correct), label("step", low, "to", high),
    label("reward", least, "to", most), text];
  return { controls, passes };
}

function showDetail(row, detail) {
  const facts = { reward: row.reward, advantage: row.advantage, tokens: row.tokens, finish: row.finish, "ground truth": row.truth, ...row.parts };
  const parts = Object.entries(facts).filter(([, value]) => value !== null && value !== undefined);
  detail.replaceChildren(
    el("div", { class: "parts" }, ...parts.map(([name, value]) => el("span", {}, `${name} ${number(value)}`))),
    ...row.prompt.flatMap(([role, content]) => [el("div", { class: "role" }, role), el("pre", {}, content)]),
    el("div", { class: "role" }, "response"), ...(row.pieces ? [legend(row)] : []),
    responseElement(row));
  detail.scrollTop = 0;
}

function legend(row) {
  const sample = (more, text) => el("span", { class: `token ${more}` }, text);
  const clipping = row.clipped ? ["; underlined: clipped in training ", sample("clipped low", "below"), " or ", sample("clipped high", "above")] : [];
  return el("p", { class: "note" }, "background: the trainer finds the token ", sample("less", "less"), " or ", sample("more", "more"),
    " likely than the server did; ", sample("untrained", "grey"), ": not trained on", ...clipping);
}

// The background is full at a difference of 0.5.
function responseElement(row) {
  if (!row.pieces) return el("pre", { class: "response" }, row.response);
  const pieces = row.pieces.map((text, i) => {
    const difference = row.differences[i], trained = row.trained[i];
    const strength = Math.min(1, Math.abs(difference ?? 0) / 0.5);
    const color = difference < 0 ? "220,38,38" : "37,99,235";
    const clipped = CLIPPED[row.clipped?.[i] ?? 0];
    return el("span", { class: `token ${trained ? "" : "untrained"} ${clipped && `clipped ${clipped[0]}`}`, style: `background:rgba(${color},${strength.toFixed(2)})`,
      title: `trainer − server: ${difference === null ? "unknown" : difference.toFixed(4)}${trained ? "" : "; not trained on"}${clipped && `; clipped ${clipped[1]}`}` }, text);
  });
  return el("pre", { class: "response" }, ...pieces);
}
