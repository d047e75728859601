// The section "Trees" of the page: draws one tree, and what is known of the node that is selected.
// All that comes from the run goes through textContent, setAttribute or a number; none of it is
// ever markup.
const KINDS = { [ROOT]: "root", [POLICY]: "policy", [ENV]: "forced", [ODE]: "deterministic" };
const LEFT = 14, TOP = 6, AXIS = 22; // pixels around the tree
const ASIDE = 16, LABEL = 60; // pixels between a leaf and its reward, and of the reward
const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home"];
const tree = { shown: null, selected: 0, scales: null }; // what is on the page

const signed = v => (v > 0 ? "+" : "") + short(v);
const within = (element, ...children) => { element.append(...children); return element; };

function trees() {
  at("trees").hidden = !data.trees.length;
  if (!data.trees.length) return;
  const canvas = at("canvas"), treeSteps = [...new Set(data.trees.map(row => row.step))];
  at("tree-step").append(...treeSteps.map(step => make("option", step)));
  const move = by => {
    const i = treeSteps.indexOf(+at("tree-step").value) + by;
    if (i >= 0 && i < treeSteps.length) pickTrees(treeSteps[i]);
  };
  at("tree-previous").addEventListener("click", () => move(-1));
  at("tree-next").addEventListener("click", () => move(1));
  at("tree-step").addEventListener("input", () => pickTrees(+at("tree-step").value));
  at("tree-index").addEventListener("input", () => showTree(rowsOfStep()[at("tree-index").value]));
  canvas.addEventListener("keydown", onKey);
  canvas.addEventListener("pointermove", event => tip(nodeUnder(event), event));
  canvas.addEventListener("pointerleave", () => tip(null));
  canvas.addEventListener("click", event => {
    const i = nodeUnder(event);
    if (i !== null) select(i);
  });
  pickTrees(treeSteps[treeSteps.length - 1]);
  let width = canvas.clientWidth;
  new ResizeObserver(() => {
    if (canvas.clientWidth === width) return;
    width = canvas.clientWidth;
    drawTree(); markSelected();
  }).observe(canvas);
}

const rowsOfStep = () => data.trees.filter(row => row.step === +at("tree-step").value);

// The trees of the step nearest to `step`; the tree of the same place stays chosen.
function pickTrees(step) {
  if (!data.trees.length) return;
  const far = row => Math.abs(row.step - step);
  at("tree-step").value = data.trees.reduce((a, b) => far(b) < far(a) ? b : a).step;
  const rows = rowsOfStep();
  const chosen = Math.min(Math.max(0, at("tree-index").selectedIndex), rows.length - 1);
  tree.scales = scalesOf(rows);
  at("tree-index").replaceChildren(...rows.map((row, k) => {
    const option = make("option", row.tree + " · " + text(row.prompt_id));
    option.value = k;
    return option;
  }));
  at("tree-index").value = chosen;
  showTree(rows[chosen]);
}

function showTree(row) {
  const nodes = row.nodes, shape = treeShape(nodes);
  tree.shown = { row, nodes, shape, images: Boolean(nodes.image) };
  tree.selected = leavesByReward(nodes, shape)[0];
  at("trees").classList.toggle("pictures", tree.shown.images);
  const first = nodes.parent.map((_, i) => imageOf(nodes, i)).find(Boolean);
  if (first) { // images of few pixels are shown as squares
    const probe = new Image();
    const isCoarse = () => at("trees").classList.toggle("coarse", probe.naturalWidth < 200);
    probe.addEventListener("load", isCoarse);
    probe.setAttribute("src", first);
  }
  tip(null); summary(); legend(); drawTree(); leafGrid(); markSelected();
  at("canvas").scrollTop = tree.shown.place.y[tree.selected] - at("canvas").clientHeight / 2;
}

function summary() {
  const { row, nodes, shape } = tree.shown, leaves = shape.leaves.length;
  const rewards = shape.leaves.map(i => nodes.reward[i]).filter(finite);
  const mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  const range = short(Math.min(...rewards)) + " to " + short(Math.max(...rewards));
  const edges = nodes.parent.filter(parent => parent >= 0).length;
  const omitted = data.omitted_tree_steps;
  at("tree-count").textContent = [
    `${leaves} ${leaves === 1 ? "leaf" : "leaves"}`,
    `${nodes.kept.filter(Boolean).length} of ${edges} edges train`,
    rewards.length ? `reward ${short(mean)} (${range})` : "no reward",
    ...(omitted ? [`the trees of ${omitted} steps are left out of this page`] : []),
  ].join(" · ");
  const known = row.answer !== null && row.answer !== undefined;
  at("tree-text").textContent = text(row.prompt);
  at("tree-answer").textContent = known ? "answer " + text(row.answer) : "";
}

// The marks that this tree has, and what they say.
function legend() {
  const { nodes } = tree.shown, { advantage, low, high } = tree.scales;
  const mark = (kind, state) => {
    const node = drawNode(kind, state, state === "dead" ? null : 0.7, 5);
    node.setAttribute("transform", "translate(9 7)");
    return within(svg("svg", { width: 18, height: 14, "aria-hidden": true }), node);
  };
  const ramp = (from, to, cls) => within(make("span", undefined, "ramp"),
    make("span", from, "value"), make("i", undefined, cls), make("span", to, "value"));
  const bound = sign => advantage > 0 ? sign + short(advantage) : "0";
  const items = [
    [ramp(bound("−"), bound("+"), "advantage"), "advantage of the edge"],
    [ramp(...(high >= low ? [short(low), short(high)] : ["–", "–"]), "values"), "value of the node"],
  ];
  const has = test => nodes.parent.some((_, i) => test(i));
  if (has(i => nodes.kind[i] === ODE)) items.push([mark(ODE, ""), "deterministic step"]);
  if (has(i => nodes.kind[i] === ENV)) items.push([mark(ENV, ""), "forced tokens"]);
  if (has(i => stateOf(nodes, i) === "pruned")) items.push([mark(POLICY, "pruned"), "does not train"]);
  if (has(i => stateOf(nodes, i) === "dead")) items.push([mark(POLICY, "dead"), "no reward below"]);
  at("tree-legend").replaceChildren(...items.map(item => within(make("span"), ...item)));
}

// A node's mark around (0, 0): what led into it is its form, its value the filling.
function drawNode(kind, state, share, r) {
  const fill = state === "pruned" ? "var(--card)" : valueColour(share), R = r + 1;
  const form = kind === ODE ? svg("path", { fill, d: `M0 ${-R}L${R} 0L0 ${R}L${-R} 0Z` })
    : kind === ENV ? svg("rect", { fill, x: -r, y: -r, width: 2 * r, height: 2 * r })
    : svg("circle", { fill, r });
  const group = within(svg("g", { class: "mark " + state }), form);
  if (kind === ROOT) group.append(svg("circle", { r: r + 3, fill: "none" }));
  const cross = `M${-r} ${-r}L${r} ${r}M${r} ${-r}L${-r} ${r}`;
  if (state === "dead") group.append(svg("path", { class: "cross", d: cross }));
  return group;
}

function drawTree() {
  const { nodes, shape, images } = tree.shown;
  const row = Math.max(15, Math.min(36, (images ? 392 : 464) / shape.leaves.length));
  const thumb = images ? row - 3 : 0, right = ASIDE + (images ? thumb + 6 : 0) + LABEL;
  const place = layoutTree(nodes, shape, (at("canvas").clientWidth || 740) - LEFT - right, row);
  const width = place.width + LEFT + right, height = place.height + TOP + AXIS;
  const edges = svg("g", { class: "edges", "aria-hidden": true });
  const labels = svg("g", { "aria-hidden": true });
  tree.shown = { ...tree.shown, place, row, thumb, items: [] };
  edges.append(svg("path", { id: "tree-path" }));
  nodes.parent.forEach((parent, i) => {
    if (parent >= 0) edges.append(drawEdge(i));
    if (parent >= 0 && nodes.text) labels.append(...edgeText(i));
    if (!shape.children[i].length) labels.append(...leafLabel(i));
    tree.shown.items.push(drawItem(i));
  });
  const plot = svg("svg", { width, height, viewBox: `${-LEFT} ${-TOP} ${width} ${height}`, role: "tree",
    "aria-label": `Tree of ${nodes.parent.length} nodes. Arrow keys: left to the parent, ` +
      "right to a child, up and down to siblings; Home to the root." });
  plot.append(edges, labels, axis(place), within(svg("g", {}), ...tree.shown.items));
  at("canvas").replaceChildren(plot);
}

// Grows with the value; steps of a chain are smaller than nodes after a split.
function radius(i) {
  const { nodes, place, row } = tree.shown, closest = Math.min(...place.gaps.slice(1), 40);
  const size = 3 + 4 * (valueShare(nodes.value[i], tree.scales) ?? 0.3);
  const part = place.gaps[nodes.depth[i]] > closest ? 1 : 0.75;
  return Math.min(size * part, 0.3 * closest, 0.42 * row);
}

// A node as it is seen, pointed at and read out.
function drawItem(i) {
  const { nodes, place, row } = tree.shown, r = radius(i), gap = place.gaps[nodes.depth[i]] || 40;
  const item = svg("g", { class: "node", role: "treeitem", tabindex: -1, "data-node": i,
    "aria-level": nodes.depth[i] + 1, "aria-label": spoken(i),
    transform: `translate(${place.x[i]} ${place.y[i]})` });
  return within(item,
    svg("circle", { class: "hit", r: Math.max(r, Math.min(11, row / 2, gap / 2)) }),
    svg("circle", { class: "ring", r: r + 4 }),
    drawNode(nodes.kind[i], stateOf(nodes, i), valueShare(nodes.value[i], tree.scales), r));
}

function edgeCurve(i) {
  const { nodes, place: { x, y } } = tree.shown, p = nodes.parent[i], middle = (x[p] + x[i]) / 2;
  return `M${x[p]} ${y[p]}C${middle} ${y[p]} ${middle} ${y[i]} ${x[i]} ${y[i]}`;
}

const edgeShare = i => advantageShare(tree.shown.nodes.advantage[i], tree.scales.advantage);

function drawEdge(i) {
  return svg("path", { d: edgeCurve(i), class: "edge " + stateOf(tree.shown.nodes, i),
    stroke: advantageColour(edgeShare(i)), "stroke-width": 1.5 + 2.5 * Math.abs(edgeShare(i)) });
}

// The beginning of a segment, on the side of its edge that the curve does not come from, where
// there is room for it.
function edgeText(i) {
  const { nodes, place: { x, y, gaps }, row } = tree.shown, r = radius(i);
  const letters = Math.floor((gaps[nodes.depth[i]] - r - 14) / 6.1);
  if (letters < 6 || row < 24) return [];
  const baseline = y[i] + (y[i] > y[nodes.parent[i]] ? 12 : -5);
  const label = svg("text", { class: "segment", x: x[i] - r - 3, y: baseline, "text-anchor": "end" });
  label.textContent = snippet(text(nodes.text[i]), letters);
  return [label];
}

function leafLabel(i) {
  const { nodes, place, thumb } = tree.shown, uri = imageOf(nodes, i);
  const x = place.x[i] + ASIDE, y = place.y[i];
  const label = svg("text", { class: "reward", x: x + (thumb ? thumb + 6 : 0), y: y + 4 });
  label.textContent = short(nodes.reward[i]);
  if (!uri) return [label];
  return [svg("image", { href: uri, x, y: y - thumb / 2, width: thumb, height: thumb }), label];
}

// Depths below the tree, as many as have room.
function axis(place) {
  const group = svg("g", { "aria-hidden": true });
  let x = 0, free = -Infinity;
  place.gaps.forEach((gap, depth) => {
    x += gap;
    if (x < free) return;
    const label = svg("text", { x, y: place.height + 13, "text-anchor": "middle" });
    label.textContent = depth;
    group.append(label);
    free = x + 18;
  });
  return group;
}

// Name and value of all that is known of a node; the first says what it is.
function facts(i) {
  const { nodes, shape } = tree.shown, kind = nodes.kind[i], leaf = !shape.children[i].length;
  const what = [KINDS[kind] + (leaf ? " leaf" : ""), ""], depth = ["depth", nodes.depth[i]];
  const worth = leaf ? ["reward", short(nodes.reward[i])] : ["value", short(nodes.value[i])];
  if (kind === ROOT) return [what, depth, worth];
  const why = { dead: "no, nothing below has a reward", pruned: "no, it is left out", "": "yes" };
  const trains = kind === ODE ? "no, it is deterministic" : kind === ENV ? "no, it is forced"
    : why[stateOf(nodes, i)];
  return [what, depth, worth, ["advantage", signed(nodes.advantage[i])], ["trains", trains]];
}

const spoken = i => facts(i).map(fact => fact.join(" ").trim()).join(", ");

function nodeUnder(event) {
  const item = event.target.closest("[data-node]");
  return item ? +item.getAttribute("data-node") : null;
}

function tip(i, event) {
  const box = at("tip");
  box.hidden = i === null;
  if (i === null) return;
  const [[kind], ...rest] = facts(i), area = at("tree-box").getBoundingClientRect();
  box.replaceChildren(make("b", kind), ...rest.map(([name, value]) =>
    within(make("div", undefined, "fact"), make("span", name), make("b", value))));
  const x = event.clientX - area.left, y = event.clientY - area.top;
  const above = y + 14 + box.offsetHeight > area.height;
  box.style.left = Math.min(x + 14, area.width - box.offsetWidth - 4) + "px";
  box.style.top = Math.max(0, above ? y - 10 - box.offsetHeight : y + 14) + "px";
}

function onKey(event) {
  if (!KEYS.includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(nextNode(tree.shown.nodes, tree.shown.shape, tree.selected, event.key), true);
}

function select(i, follow = false) {
  tree.selected = i;
  markSelected();
  tree.shown.items[i].focus({ preventScroll: !follow });
}

function markSelected() {
  const { nodes, items, images } = tree.shown, path = pathTo(nodes, tree.selected);
  items.forEach((item, i) => {
    item.setAttribute("aria-selected", i === tree.selected);
    item.setAttribute("tabindex", i === tree.selected ? 0 : -1);
  });
  for (const button of at("leaf-grid").children)
    button.setAttribute("aria-pressed", +button.dataset.node === tree.selected);
  at("tree-path").setAttribute("d", path.slice(1).map(edgeCurve).join(""));
  const [[kind], ...rest] = facts(tree.selected);
  const list = within(make("dl"), ...rest.map(([name, value]) =>
    within(make("div"), make("dt", name), make("dd", value))));
  at("node").replaceChildren(make("h3", kind), list, images ? picture(tree.selected) : pathText(path));
  at("path").replaceChildren(...(images ? path.map(pathImage) : []));
  const own = at("node").querySelector("mark");
  if (own) own.parentNode.scrollTop = own.offsetTop - own.parentNode.clientHeight / 2;
}

function picture(i) {
  const uri = imageOf(tree.shown.nodes, i);
  if (!uri) return make("span", "no image", "picture");
  const image = make("img", undefined, "picture");
  image.setAttribute("src", uri);
  image.setAttribute("alt", spoken(i));
  return image;
}

// The text from the root on, each segment underlined in the colour of its edge.
function pathText(path) {
  const { nodes } = tree.shown, said = path.filter(i => nodes.text && text(nodes.text[i]));
  return within(make("div", undefined, "path-text"), ...said.map(i => {
    const segment = make(i === tree.selected ? "mark" : "span", text(nodes.text[i]));
    segment.style.textDecorationColor = advantageColour(edgeShare(i));
    segment.title = spoken(i);
    segment.addEventListener("click", () => select(i));
    return segment;
  }));
}

function imageButton(i, caption) {
  const button = within(make("button"), picture(i), make("span", caption, "value"));
  button.dataset.node = i;
  button.addEventListener("click", () => select(i));
  return button;
}

function pathImage(i) {
  const button = imageButton(i, tree.shown.nodes.depth[i]);
  button.style.borderBottomColor = advantageColour(edgeShare(i));
  button.setAttribute("aria-pressed", i === tree.selected);
  button.tabIndex = -1; // the arrow keys lead to these nodes
  return button;
}

function leafGrid() {
  const { nodes, shape, images } = tree.shown, best = images ? leavesByReward(nodes, shape) : [];
  at("leaf-grid").replaceChildren(...best.map(i => imageButton(i, short(nodes.reward[i]))));
}
