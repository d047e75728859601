"use strict";
// Trees of rollouts: where their nodes stand, what colour they have, and the ways through them.
// Pure functions; report_tree_view.js draws. `nodes` is that of a line of trees/step_<n>.jsonl:
// parallel arrays, parents before children.
const ROOT = "root", POLICY = "policy", ENV = "env", ODE = "ode";
const NARROW = 0.3; // width of a level on which nothing branches, beside one on which something does
const SMALLEST = 10, WIDEST = 260; // pixels of a narrow and of a whole level
const finite = v => typeof v === "number" && Number.isFinite(v);

// Children of each node, nodes of each depth from top to bottom, and leaves from top to bottom.
function treeShape(nodes) {
  const children = nodes.parent.map(() => []), levels = [], leaves = [];
  const stack = []; // the next to visit is last
  nodes.parent.forEach((parent, i) => parent < 0 ? stack.unshift(i) : children[parent].push(i));
  while (stack.length) {
    const i = stack.pop();
    (levels[nodes.depth[i]] ||= []).push(i);
    if (!children[i].length) leaves.push(i);
    stack.push(...children[i].slice().reverse());
  }
  return { children, levels, leaves };
}

// The root is left, a column is a depth, and leaves have a row each; an inner node stands midway
// between its first and last child, so a chain is a straight line. Returns pixels: x and y of each
// node, the gap to the column before each depth, and the size of it all.
function layoutTree(nodes, shape, width, row) {
  const splits = shape.levels.map(level => level.some(i => shape.children[i].length > 1));
  const weights = shape.levels.map((_, depth) => depth === 0 ? 0 : splits[depth - 1] ? 1 : NARROW);
  const total = weights.reduce((a, b) => a + b, 0) || 1;
  const unit = Math.min(WIDEST, Math.max(SMALLEST / NARROW, width / total));
  const gaps = weights.map(weight => weight * unit);
  let reached = 0;
  const columns = gaps.map(gap => reached += gap);
  const x = nodes.depth.map(depth => columns[depth]), y = nodes.depth.map(() => 0);
  shape.leaves.forEach((leaf, k) => { y[leaf] = (k + 0.5) * row; });
  for (let i = y.length - 1; i >= 0; i--) {
    const below = shape.children[i];
    if (below.length) y[i] = (y[below[0]] + y[below[below.length - 1]]) / 2;
  }
  return { x, y, gaps, width: total * unit, height: shape.leaves.length * row };
}

// From the root to `node`, both included.
function pathTo(nodes, node) {
  const path = [];
  for (let i = node; i >= 0; i = nodes.parent[i]) path.unshift(i);
  return path;
}

// Where an arrow key leads: left to the parent, right to the first child, up and down to the next
// node of the same depth (a sibling, if there is one on that side); Home to the root.
function nextNode(nodes, shape, node, key) {
  const level = shape.levels[nodes.depth[node]], at = level.indexOf(node);
  const to = { ArrowLeft: nodes.parent[node], ArrowRight: shape.children[node][0],
    ArrowUp: level[at - 1], ArrowDown: level[at + 1], Home: shape.levels[0][0] }[key];
  return to === undefined || to < 0 ? node : to;
}

// "dead": no scorable leaf below; "pruned": the policy chose it, and it does not train.
function stateOf(nodes, i) {
  if (!finite(nodes.value[i])) return "dead";
  return nodes.kind[i] === POLICY && nodes.kept[i] === false ? "pruned" : "";
}

// Best reward first; leaves without one last.
function leavesByReward(nodes, shape) {
  const rank = i => finite(nodes.reward[i]) ? nodes.reward[i] : -Infinity;
  return shape.leaves.slice().sort((a, b) => rank(b) === rank(a) ? 0 : rank(b) - rank(a));
}

// Bounds of the colours, the same for all `trees` of a step: the largest |advantage|, and the range
// of the values.
function scalesOf(trees) {
  let advantage = 0, low = Infinity, high = -Infinity;
  for (const { nodes } of trees) nodes.value.forEach((value, i) => {
    if (finite(nodes.advantage[i])) advantage = Math.max(advantage, Math.abs(nodes.advantage[i]));
    if (finite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  });
  return { advantage, low, high };
}

// In [-1, 1]; 0 for an advantage that is none.
const advantageShare = (advantage, scale) =>
  finite(advantage) && scale > 0 ? Math.max(-1, Math.min(1, advantage / scale)) : 0;
// In [0, 1]; the middle where all values are one, and null where there is none.
const valueShare = (value, scales) => !finite(value) ? null
  : scales.high > scales.low ? (value - scales.low) / (scales.high - scales.low) : 0.5;

// Colours are mixed by the browser from the variables of the page, which know light and dark.
const advantageColour = share => mixed(share < 0 ? "--less" : "--more", "--zero", Math.abs(share));
const valueColour = share => share === null ? "var(--card)" : mixed("--high", "--low", share);
const mixed = (to, from, share) =>
  `color-mix(in oklab, var(${to}) ${Math.round(100 * share)}%, var(${from}))`;

// Text on one line of at most `length` characters.
function snippet(text, length) {
  const line = Array.from(text.replace(/\s+/g, " ").trim());
  if (line.length <= length) return line.join("");
  return line.slice(0, Math.max(0, length - 1)).join("").trim() + "…";
}

// What may be shown as an image: one that is in the page. Anything else would be loaded from
// elsewhere.
const IMAGE = /^data:image\/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+=*$/;
function imageOf(nodes, i) {
  const uri = nodes.image ? nodes.image[i] : null;
  return typeof uri === "string" && IMAGE.test(uri) ? uri : null;
}
