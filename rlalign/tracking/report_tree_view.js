// The section "Trees" of the page: draws one tree, and what is known of the node that is selected.
// All text from the run goes through textContent, setAttribute or a number; none of it is ever markup.
const KINDS = ["root", "policy", "forced", "deterministic"];
const LEFT = 14, TOP = 6, AXIS = 22, LABEL = 60, ASIDE = 16; // pixels around the tree, of a leaf's reward, and before it
const tree = { shown: null, selected: 0, scales: null }; // what is on the page
const signed = v => (v > 0 ? "+" : "") + short(v);

function trees() {
  at("trees").hidden = !data.trees.length;
  if (!data.trees.length) return;
  const treeSteps = [...new Set(data.trees.map(row => row.step))];
  for (const step of treeSteps) at("tree-step").append(make("option", step));
  const move = by => { const i = treeSteps.indexOf(+at("tree-step").value) + by;
    if (i >= 0 && i < treeSteps.length) pickTrees(treeSteps[i]); };
  at("tree-previous").addEventListener("click", () => move(-1));
  at("tree-next").addEventListener("click", () => move(1));
  at("tree-step").addEventListener("input", () => pickTrees(+at("tree-step").value));
  at("tree-index").addEventListener("input", () => showTree(rowsOfStep()[at("tree-index").value]));
  at("canvas").addEventListener("keydown", onKey);
  at("canvas").addEventListener("pointermove", event => tip(nodeUnder(event), event));
  at("canvas").addEventListener("pointerleave", () => tip(null));
  at("canvas").addEventListener("click", event => { const i = nodeUnder(event); if (i !== null) select(i); });
  pickTrees(treeSteps[treeSteps.length - 1]);
  let width = at("canvas").clientWidth;
  new ResizeObserver(() => { if (at("canvas").clientWidth === width) return;
    width = at("canvas").clientWidth; drawTree(); markSelected(); }).observe(at("canvas"));
}

const rowsOfStep = () => data.trees.filter(row => row.step === +at("tree-step").value);

// The trees of the step nearest to `step`; the tree of the same place stays chosen.
function pickTrees(step) {
  if (!data.trees.length) return;
  const near = data.trees.reduce((a, b) => Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a);
  at("tree-step").value = near.step;
  const rows = rowsOfStep(), chosen = Math.min(Math.max(0, at("tree-index").selectedIndex), rows.length - 1);
  tree.scales = scalesOf(rows);
  at("tree-index").replaceChildren(...rows.map((row, k) => {
    const option = make("option", row.tree + " · " + text(row.prompt_id)); option.value = k; return option; }));
  at("tree-index").value = chosen;
  showTree(rows[chosen]);
}

function showTree(row) {
  const nodes = row.nodes, shape = treeShape(nodes);
  tree.shown = { row, nodes, shape, images: Boolean(nodes.image) };
  tree.selected = leavesByReward(nodes, shape)[0];
  const first = nodes.parent.map((_, i) => imageOf(nodes, i)).find(Boolean);
  if (first) { const probe = new Image();
    probe.addEventListener("load", () => at("trees").classList.toggle("coarse", probe.naturalWidth < 200));
    probe.setAttribute("src", first); }
  at("trees").classList.toggle("pictures", tree.shown.images);
  summary(); legend(); drawTree(); leafGrid(); markSelected();
  at("canvas").scrollTop = tree.shown.place.y[tree.selected] - at("canvas").clientHeight / 2;
}

function summary() {
  const { row, nodes, shape } = tree.shown, rewards = shape.leaves.map(i => nodes.reward[i]).filter(finite);
  const mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  const kept = nodes.kept.filter(Boolean).length;
  const leaves = shape.leaves.length;
  at("tree-count").textContent = `${leaves} ${leaves === 1 ? "leaf" : "leaves"} · ${kept} of ${nodes.parent.length - shape.levels[0].length} edges train · ` +
    (rewards.length ? `reward ${short(mean)} (${short(Math.min(...rewards))} to ${short(Math.max(...rewards))})` : "no reward") +
    (data.omitted_tree_steps ? ` · ${data.omitted_tree_steps} steps are left out of this page` : "");
  at("tree-text").textContent = text(row.prompt);
  at("tree-answer").textContent = row.answer === null || row.answer === undefined ? "" : "answer " + text(row.answer);
}

// The marks that this tree has, and what they say.
function legend() {
  const { nodes } = tree.shown, scales = tree.scales, has = test => nodes.parent.some((_, i) => test(i));
  const item = (drawing, label) => { const e = make("span"); e.append(drawing, label); return e; };
  const bar = (low, high, cls) => { const e = make("span", undefined, "ramp");
    e.append(make("span", low, "value"), make("i", undefined, cls), make("span", high, "value")); return e; };
  const mark = (kind, state) => { const e = svg("svg", { width: 18, height: 14, "aria-hidden": true });
    const node = drawNode(kind, state, state === "dead" ? null : 0.7, 5); node.setAttribute("transform", "translate(9 7)"); e.append(node); return e; };
  const marks = [[ODE, "", "deterministic step", i => nodes.kind[i] === ODE], [ENV, "", "forced tokens", i => nodes.kind[i] === ENV],
    [POLICY, "pruned", "does not train", i => stateOf(nodes, i) === "pruned"], [POLICY, "dead", "no reward below", i => stateOf(nodes, i) === "dead"]];
  const bound = short(scales.advantage), range = scales.high >= scales.low ? [short(scales.low), short(scales.high)] : ["–", "–"];
  at("tree-legend").replaceChildren(
    item(bar(scales.advantage > 0 ? "−" + bound : "0", scales.advantage > 0 ? "+" + bound : "0", "advantage"), "advantage of the edge"),
    item(bar(...range, "values"), "value of the node"),
    ...marks.filter(m => has(m[3])).map(m => item(mark(m[0], m[1]), m[2])));
}

// A node's mark around (0, 0): what led into it is its form, its value the filling.
function drawNode(kind, state, share, r) {
  const group = svg("g", { class: "mark " + state });
  const look = { fill: state === "pruned" ? "var(--card)" : valueColour(share) };
  if (kind === ODE) group.append(svg("path", { d: `M0 ${-r - 1}L${r + 1} 0L0 ${r + 1}L${-r - 1} 0Z`, ...look }));
  else if (kind === ENV) group.append(svg("rect", { x: -r, y: -r, width: 2 * r, height: 2 * r, ...look }));
  else group.append(svg("circle", { r, ...look }));
  if (kind === ROOT) group.append(svg("circle", { r: r + 3, fill: "none" }));
  if (state === "dead") group.append(svg("path", { class: "cross", d: `M${-r} ${-r}L${r} ${r}M${r} ${-r}L${-r} ${r}` }));
  return group;
}

function drawTree() {
  const { nodes, shape, images } = tree.shown;
  const row = Math.max(15, Math.min(36, (images ? 392 : 464) / shape.leaves.length)), thumb = images ? row - 3 : 0;
  const right = ASIDE + (images ? thumb + 6 : 0) + LABEL;
  const place = layoutTree(nodes, shape, (at("canvas").clientWidth || 740) - LEFT - right, row);
  const gap = Math.min(...place.gaps.slice(1), 40);
  const size = (share, depth) => // steps of a chain are smaller than nodes after a split
    Math.min((3 + 4 * (share ?? 0.3)) * (place.gaps[depth] > gap ? 1 : 0.75), 0.3 * gap, 0.42 * row);
  const W = place.width + LEFT + right, H = place.height + TOP + AXIS;
  const plot = svg("svg", { width: W, height: H, viewBox: `${-LEFT} ${-TOP} ${W} ${H}`, role: "tree",
    "aria-label": `Tree of ${nodes.parent.length} nodes. Arrow keys: left to the parent, right to a child, up and down to siblings; Home to the root.` });
  const edges = svg("g", { class: "edges", "aria-hidden": true }), labels = svg("g", { "aria-hidden": true }), marks = svg("g", {});
  edges.append(svg("path", { id: "tree-path" }));
  tree.shown = { ...tree.shown, place, items: [] };
  nodes.parent.forEach((parent, i) => {
    const share = valueShare(nodes.value[i], tree.scales), state = stateOf(nodes, i), r = size(share, nodes.depth[i]);
    if (parent >= 0) edges.append(drawEdge(i, state));
    if (parent >= 0 && nodes.text) labels.append(...edgeText(i, row, r));
    if (!shape.children[i].length) labels.append(...leafLabel(i, thumb));
    const item = svg("g", { class: "node", role: "treeitem", tabindex: -1, "data-node": i, "aria-level": nodes.depth[i] + 1,
      "aria-label": spoken(i), transform: `translate(${place.x[i]} ${place.y[i]})` });
    item.append(svg("circle", { class: "hit", r: Math.max(r, Math.min(11, row / 2, gap / 2)) }), svg("circle", { class: "ring", r: r + 4 }),
      drawNode(nodes.kind[i], state, share, r));
    tree.shown.items.push(item); marks.append(item);
  });
  plot.append(edges, labels, axis(place), marks);
  at("canvas").replaceChildren(plot);
}

const edgeCurve = i => { const { nodes, place: { x, y } } = tree.shown, p = nodes.parent[i], middle = (x[p] + x[i]) / 2;
  return `M${x[p]} ${y[p]}C${middle} ${y[p]} ${middle} ${y[i]} ${x[i]} ${y[i]}`; };

function drawEdge(i, state) {
  const share = advantageShare(tree.shown.nodes.advantage[i], tree.scales.advantage);
  return svg("path", { d: edgeCurve(i), class: "edge " + state, stroke: advantageColour(share), "stroke-width": 1.5 + 2.5 * Math.abs(share) });
}

// The beginning of a segment, on the side of its edge that the curve does not come from, where there
// is room for it.
function edgeText(i, row, r) {
  const { nodes, place } = tree.shown, letters = Math.floor((place.gaps[nodes.depth[i]] - r - 14) / 6.1);
  if (letters < 6 || row < 24) return [];
  const below = place.y[i] > place.y[nodes.parent[i]];
  const label = svg("text", { class: "segment", x: place.x[i] - r - 3, y: place.y[i] + (below ? 12 : -5), "text-anchor": "end" });
  label.textContent = snippet(text(nodes.text[i]), letters);
  return [label];
}

function leafLabel(i, thumb) {
  const { nodes, place } = tree.shown, uri = imageOf(nodes, i), x = place.x[i] + ASIDE, drawn = [];
  if (uri) drawn.push(svg("image", { href: uri, x, y: place.y[i] - thumb / 2, width: thumb, height: thumb }));
  const label = svg("text", { class: "reward", x: x + (thumb ? thumb + 6 : 0), y: place.y[i] + 4 });
  label.textContent = short(nodes.reward[i]);
  return [...drawn, label];
}

// Depths below the tree, as many as have room.
function axis(place) {
  const group = svg("g", { class: "depths", "aria-hidden": true });
  let x = 0, free = -Infinity;
  place.gaps.forEach((gap, depth) => {
    x += gap;
    if (x < free) return;
    const label = svg("text", { x, y: place.height + 13, "text-anchor": "middle" });
    label.textContent = depth; group.append(label); free = x + 18;
  });
  return group;
}

function facts(i) {
  const { nodes, shape } = tree.shown, state = stateOf(nodes, i), leaf = !shape.children[i].length;
  const trains = nodes.kind[i] === ROOT ? null : nodes.kind[i] === ODE ? "no, it is deterministic" : nodes.kind[i] === ENV ? "no, it is forced"
    : state === "dead" ? "no, nothing below has a reward" : state === "pruned" ? "no, it is left out" : "yes";
  return [[KINDS[nodes.kind[i]] + (leaf ? " leaf" : ""), ""], ["depth", nodes.depth[i]], [leaf ? "reward" : "value", short(leaf ? nodes.reward[i] : nodes.value[i])],
    ...(nodes.kind[i] === ROOT ? [] : [["advantage", signed(nodes.advantage[i])], ["trains", trains]])];
}

const spoken = i => facts(i).map(fact => fact.join(" ").trim()).join(", ");
const nodeUnder = event => { const item = event.target.closest("[data-node]"); return item ? +item.getAttribute("data-node") : null; };

function tip(i, event) {
  at("tip").hidden = i === null;
  if (i === null) return;
  const [[kind], ...rest] = facts(i), box = at("tree-box").getBoundingClientRect();
  const lines = rest.map(([name, value]) => { const line = make("div", undefined, "fact"); line.append(make("span", name), make("b", value)); return line; });
  at("tip").replaceChildren(make("b", kind), ...lines);
  const x = event.clientX - box.left, y = event.clientY - box.top;
  at("tip").style.left = Math.min(x + 14, box.width - at("tip").offsetWidth - 4) + "px";
  at("tip").style.top = Math.max(0, y + 14 + at("tip").offsetHeight > box.height ? y - 10 - at("tip").offsetHeight : y + 14) + "px";
}

function onKey(event) {
  const next = nextNode(tree.shown.nodes, tree.shown.shape, tree.selected, event.key);
  if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home"].includes(event.key)) return;
  event.preventDefault(); select(next, true);
}

function select(i, follow = false) {
  tree.selected = i; markSelected();
  tree.shown.items[i].focus({ preventScroll: !follow });
}

function markSelected() {
  const { nodes, items, images } = tree.shown, path = pathTo(nodes, tree.selected);
  items.forEach((item, i) => { item.setAttribute("aria-selected", i === tree.selected); item.setAttribute("tabindex", i === tree.selected ? 0 : -1); });
  at("tree-path").setAttribute("d", path.slice(1).map(edgeCurve).join(""));
  for (const button of at("leaf-grid").children) button.setAttribute("aria-pressed", +button.dataset.node === tree.selected);
  const [[kind], ...rest] = facts(tree.selected), list = make("dl");
  for (const [name, value] of rest) { const pair = make("div"); pair.append(make("dt", name), make("dd", value)); list.append(pair); }
  at("node").replaceChildren(make("h3", kind), list, images ? picture(tree.selected) : pathText(path));
  at("path").replaceChildren(...(images ? path.map(pathImage) : []));
  const own = at("node").querySelector("mark");
  at("node").scrollTop = own ? own.offsetTop - at("node").clientHeight / 2 : 0;
}

function picture(i) {
  const uri = imageOf(tree.shown.nodes, i), e = make(uri ? "img" : "span", undefined, "picture");
  if (uri) { e.setAttribute("src", uri); e.setAttribute("alt", spoken(i)); }
  else e.textContent = "no image";
  return e;
}

// The text from the root on, each segment underlined in the colour of its edge.
function pathText(path) {
  const { nodes } = tree.shown, block = make("div", undefined, "path-text");
  for (const i of path) {
    if (!nodes.text || !text(nodes.text[i])) continue;
    const segment = make(i === tree.selected ? "mark" : "span", text(nodes.text[i]));
    segment.style.textDecorationColor = advantageColour(advantageShare(nodes.advantage[i], tree.scales.advantage));
    segment.title = "depth " + nodes.depth[i] + ", advantage " + signed(nodes.advantage[i]);
    segment.addEventListener("click", () => select(i)); block.append(segment);
  }
  return block;
}

function imageButton(i, caption) {
  const button = make("button"); button.dataset.node = i;
  button.append(picture(i), make("span", caption, "value")); button.addEventListener("click", () => select(i));
  return button;
}

function pathImage(i) {
  const { nodes } = tree.shown, button = imageButton(i, nodes.depth[i]);
  button.style.borderBottomColor = advantageColour(advantageShare(nodes.advantage[i], tree.scales.advantage));
  button.setAttribute("aria-pressed", i === tree.selected); button.tabIndex = -1;
  return button;
}

function leafGrid() {
  const { nodes, shape, images } = tree.shown;
  at("leaf-grid").replaceChildren(...(images ? leavesByReward(nodes, shape).map(i => imageButton(i, short(nodes.reward[i]))) : []));
}
