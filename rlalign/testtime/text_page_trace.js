"use strict";
// The two searches that can be walked through: LatentSeek's path and RAIN's tree.

// ---- LatentSeek: step by step, with the reward of each and the tokens that it changed

function latentPath(trace, record) {
  const steps = trace.steps || [], body = make("div", undefined, "step"), slider = make("input"), where = make("span", "", "value");
  if (!steps.length) return section("path", make("p", "No latent was moved.", "soft"));
  slider.type = "range"; slider.min = 0; slider.max = steps.length - 1;
  slider.id = "step-slider"; slider.setAttribute("aria-label", "step");
  const { plot, dots } = chart(steps.map(step => step.reward), "reward of each step", i => go(i));
  const go = i => {
    const k = Math.max(0, Math.min(steps.length - 1, i));
    slider.value = k; slider.setAttribute("aria-valuetext", `step ${steps[k].step}, reward ${short(steps[k].reward)}`);
    where.textContent = `step ${steps[k].step} of ${steps[steps.length - 1].step}`;
    dots.forEach((dot, j) => dot && dot.setAttribute("class", j === k ? "dot now" : "dot"));
    body.replaceChildren(...stepBody(steps[k], steps[k].text === record.text)); };
  slider.addEventListener("input", () => go(+slider.value));
  go(chosenStep(steps, record.text));
  const controls = within(make("div", undefined, "controls"), button("←", () => go(+slider.value - 1), "previous step"), slider,
    button("→", () => go(+slider.value + 1), "next step"), where);
  return section(`path of ${trace.num_latents} latents`, ...(steps.length > 1 ? [plot, controls] : []), body);
}

function stepBody(step, returned) {
  const { tokens, rest, text } = pathPieces(step), roles = Object.entries(step.roles || {});
  const words = within(make("pre", undefined, "text"), ...tokens.map(({ token, changed }) => {
    const piece = make(changed ? "mark" : "span", token, "latent");
    if (changed) piece.title = "changed in this step";
    return piece; }));
  if (rest !== null) words.append(make("span", rest));
  const number = (step.changed || []).length;
  const line = [["reward", short(step.reward)], ["tokens changed", number], ["steps without a change before it", step.repeats],
    ["returned", returned ? "yes" : "no"]];
  const badges = within(make("div", undefined, "roles"), ...roles.map(([role, good]) =>
    make("span", `${role.replaceAll("_", " ")}: ${good === true ? "approved" : good === false ? "refused" : "no verdict"}`,
      good === true ? "good" : good === false ? "bad" : "soft")));
  const whole = rest === null ? [make("div", "the whole text", "soft"), make("pre", text, "text")] : [];
  return [facts(line), ...(roles.length ? [badges] : []), words, ...whole];
}

// ---- RAIN: the tree, whose committed path is a trunk down the page

function searchTree(trace) {
  const nodes = trace.nodes || [];
  if (!nodes.length) return section("search tree", make("p", "The nodes were not kept.", "soft"), commitLine(trace, () => {}));
  const tree = treeOf(nodes), box = make("div", undefined, "tree"), panel = make("aside", undefined, "node");
  const commits = trace.commits || [];
  const state = { open: openAtFirst(tree), id: commits.length ? commits[commits.length - 1].node : tree.roots[0] };
  box.setAttribute("role", "tree"); box.setAttribute("aria-label", "Search tree. Arrow keys: up and down, right opens, left closes.");
  panel.setAttribute("aria-label", "selected node"); panel.setAttribute("aria-live", "polite");
  const rows = new Map();
  const draw = () => {
    rows.clear();
    box.replaceChildren(...visibleNodes(tree, state.open).map(id => { const row = treeRow(tree, state.open, id); rows.set(id, row); return row; }));
    mark(false); };
  const mark = follow => {
    for (const [id, row] of rows) { row.setAttribute("aria-selected", String(id === state.id)); row.tabIndex = id === state.id ? 0 : -1; }
    panel.replaceChildren(...nodeFacts(tree, trace, state.id));
    const row = rows.get(state.id);
    if (row && follow) { row.focus({ preventScroll: true }); row.scrollIntoView({ block: "nearest" }); } };
  const pick = id => { // a node that is hidden is brought to light
    const hidden = pathTo(tree, id).slice(0, -1).filter(i => !state.open.has(i));
    state.id = id;
    if (hidden.length) { hidden.forEach(i => state.open.add(i)); draw(); }
    mark(true); };
  const setOpen = (id, open) => { open ? state.open.add(id) : state.open.delete(id); state.id = id; draw(); mark(true); };
  const row = event => { const item = event.target.closest("[data-node]"); return item ? +item.dataset.node : null; };
  box.addEventListener("click", event => {
    const id = row(event);
    if (id === null) return;
    if (event.target.closest(".twist") && kids(tree, id).length) setOpen(id, !state.open.has(id)); else pick(id); });
  box.addEventListener("keydown", event => {
    const next = plain(event) ? treeKey(tree, state.open, state.id, event.key) : null;
    if (!next) return;
    event.preventDefault();
    if (next.open === undefined) pick(next.id); else setOpen(next.id, next.open); });
  const reset = open => { state.open = open; if (!visibleNodes(tree, open).includes(state.id)) state.id = tree.roots[0]; draw(); };
  const controls = within(make("div", undefined, "controls"),
    button("committed path", () => reset(openAtFirst(tree))), button("open all", () => reset(new Set(tree.byId.keys()))),
    button("close all", () => reset(new Set())),
    make("span", `${nodes.length} nodes` + (trace.dropped ? `, ${trace.dropped} more were not kept` : ""), "soft"));
  draw();
  return section("search tree", commitLine(trace, pick), controls, within(make("div", undefined, "tree-box"), box, panel));
}

// The committed text, each set of tokens a button that leads to its node.
function commitLine(trace, pick) {
  return within(make("p", undefined, "commits"), ...(trace.commits || []).map((commit, k) => {
    const piece = button(commit.text.trim() ? commit.text : oneLine(commit.text), () => pick(commit.node), `committed set ${k + 1}: ${commit.text}`);
    piece.title = `${commit.searches} searches` + (commit.below_threshold ? ", below the threshold" : "");
    if (commit.below_threshold) piece.className = "below";
    return piece; }));
}

function treeRow(tree, open, id) {
  const node = tree.byId.get(id), below = kids(tree, id).length, row = make("div", undefined, "row" + (node.committed ? " committed" : ""));
  row.setAttribute("role", "treeitem"); row.setAttribute("aria-level", tree.level.get(id)); row.dataset.node = id;
  if (below) row.setAttribute("aria-expanded", String(open.has(id)));
  row.style.paddingLeft = 6 + 16 * Math.min(12, tree.indent.get(id)) + "px";
  const q = make("span", short(node.q), "value " + (node.q > 0 ? "good" : node.q < 0 ? "bad" : "soft"));
  const label = make("span", node.parent < 0 && !node.text ? "root" : oneLine(node.text), "token");
  row.setAttribute("aria-label", `${label.textContent}, ${short(node.n)} visits, value ${short(node.q)}` +
    (node.committed ? ", committed" : "") + (node.terminal ? ", ends" : ""));
  return within(row, make("span", below ? (open.has(id) ? "▾" : "▸") : " ", "twist"), label,
    make("span", `n ${short(node.n)}`, "value soft"), q, ...(node.terminal ? [make("span", "end", "soft")] : []));
}

function nodeFacts(tree, trace, id) {
  const node = tree.byId.get(id), commit = (trace.commits || []).find(c => c.node === id);
  const words = within(make("pre", undefined, "text"), ...pathTo(tree, id).map(i =>
    make(i === id ? "mark" : "span", tree.byId.get(i).text)));
  return [make("h4", `node ${id}`), facts([["weighted visits", short(node.n)], ["visits", node.visits], ["value", short(node.q)],
    ["prior", short(node.p)], ["depth", node.depth], ["children", kids(tree, id).length],
    ["committed", node.committed ? "yes" : "no"], ["ends here", node.terminal ? "yes" : "no"],
    ["searches", commit && commit.searches], ["below the threshold", commit && (commit.below_threshold ? "yes" : "no")]]),
    make("div", "from the root to here", "soft"), words];
}

head(); lists(); filter();
