"use strict";
// Records of rlalign decode: which are shown, and how a search tree and a path are laid out.
// Pure functions; text_page_view.js draws.
const finite = v => typeof v === "number" && Number.isFinite(v);
const short = v => !finite(v) ? "–" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3)
  ? v.toExponential(2) : String(+v.toPrecision(4));
const BUDGETS = ["max_tokens", "max_wall_s", "max_total_searches"];
const PAGE = 200; // records that a list shows before it is scrolled

// A prompt as people read it: a text, the last of its messages, or token ids.
function promptText(prompt) {
  if (typeof prompt === "string") return prompt;
  if (!Array.isArray(prompt)) return prompt === null || prompt === undefined ? "" : JSON.stringify(prompt);
  const last = prompt[prompt.length - 1];
  return last && typeof last.content === "string" ? last.content : prompt.join(" ");
}

const KINDS = {
  all: () => true, right: r => r.right === true, wrong: r => r.right === false && !r.error,
  over: r => BUDGETS.includes(r.stop_reason), cut: r => r.finish === "length", error: r => Boolean(r.error),
};
// One word on a record, for its mark in the list.
function outcome(record) {
  if (record.error) return "error";
  return record.right === true ? "right" : record.right === false ? "wrong" : "";
}

// The places of the records of a kind that contain the words.
function choose(records, kind, words) {
  const wanted = words.trim().toLowerCase();
  const holds = r => [r.id, promptText(r.prompt), r.text, r.error, r.answer]
    .some(v => String(v ?? "").toLowerCase().includes(wanted));
  return records.flatMap((r, i) => KINDS[kind](r) && (!wanted || holds(r)) ? [i] : []);
}

// Where a key leads in a list of `count` entries.
function moveTo(at, count, key) {
  const to = { ArrowUp: at - 1, ArrowDown: at + 1, PageUp: at - 10, PageDown: at + 10, Home: 0, End: count - 1 }[key];
  return to === undefined ? null : Math.max(0, Math.min(count - 1, to));
}

// A search tree from its nodes, in any order. A node whose parent is not there is a root. Among
// children the committed one comes last, behind the others by their visits: the committed path is
// then a trunk that runs down the page, and `indent` counts the levels beside it.
function treeOf(nodes) {
  const byId = new Map(nodes.map(node => [node.id, node])), children = new Map(), roots = [];
  for (const node of nodes) {
    const parent = byId.has(node.parent) && node.parent !== node.id ? node.parent : null;
    if (parent === null) roots.push(node.id);
    else children.set(parent, [...children.get(parent) || [], node.id]);
  }
  const rank = id => { const n = byId.get(id); return [n.committed ? 1 : 0, -(n.n || 0), n.id]; };
  const order = (a, b) => { const x = rank(a), y = rank(b); return x[0] - y[0] || x[1] - y[1] || x[2] - y[2]; };
  for (const ids of children.values()) ids.sort(order);
  roots.sort((a, b) => -order(a, b)); // the root of all before what lost its parent
  const level = new Map(), indent = new Map(), parent = new Map(), stack = roots.map(id => [id, null]);
  while (stack.length) {
    const [id, from] = stack.pop(), node = byId.get(id);
    parent.set(id, from);
    level.set(id, from === null ? 1 : level.get(from) + 1);
    indent.set(id, node.committed || from === null ? 0 : indent.get(from) + 1);
    for (const child of children.get(id) || []) stack.push([child, id]);
  }
  return { byId, children, roots, parent, level, indent };
}

const kids = (tree, id) => tree.children.get(id) || [];

// The ids that are seen when those in the set `open` show their children, from top to bottom.
function visibleNodes(tree, open) {
  const seen = [], stack = tree.roots.slice().reverse();
  while (stack.length) {
    const id = stack.pop();
    seen.push(id);
    if (open.has(id)) stack.push(...kids(tree, id).slice().reverse());
  }
  return seen;
}

// Those that are open at first: the committed path, so that all of it and what stood beside it is seen.
function openAtFirst(tree) {
  const open = new Set(tree.roots);
  for (const [id, node] of tree.byId) if (node.committed && kids(tree, id).length) open.add(id);
  return open;
}

// From a root to the node, both included.
function pathTo(tree, id) {
  const path = [];
  for (let i = id; i !== null && i !== undefined; i = tree.parent.get(i)) path.unshift(i);
  return path;
}

// What a key does at a node: the node it leads to and what it opens or closes, as trees do
// everywhere: right opens, then enters; left closes, then leaves.
function treeKey(tree, open, id, key) {
  const seen = visibleNodes(tree, open), at = seen.indexOf(id), isOpen = open.has(id);
  const below = kids(tree, id);
  if (key === "ArrowRight") return below.length && !isOpen ? { id, open: true } : { id: isOpen && below.length ? below[0] : id };
  if (key === "ArrowLeft") return isOpen && below.length ? { id, open: false } : { id: tree.parent.get(id) ?? id };
  if (key === "Enter" || key === " ") return below.length ? { id, open: !isOpen } : { id };
  const to = moveTo(at, seen.length, key);
  return to === null ? null : { id: seen[to] };
}

// Points of a curve in a box; what is no number leaves a gap. One value is a line through the middle.
function curvePoints(values, width, height, pad) {
  const known = values.filter(finite);
  let low = Math.min(...known), high = Math.max(...known);
  if (low === high) { low -= 0.5; high += 0.5; }
  const step = values.length > 1 ? (width - 2 * pad) / (values.length - 1) : 0;
  const x = i => values.length > 1 ? pad + i * step : width / 2;
  return values.map((v, i) => finite(v) ? [x(i), height - pad - (v - low) / (high - low) * (height - 2 * pad)] : null);
}

// A text as tokens that were optimised, each with whether it changed, and what follows them.
function pathPieces(step) {
  const prefix = step.prefix || [], changed = new Set(step.changed || []);
  const joined = prefix.join(""), text = step.text || "";
  const rest = text.startsWith(joined) ? text.slice(joined.length) : null;
  return { tokens: prefix.map((token, i) => ({ token, changed: changed.has(i) })), rest, text };
}

// The place of the step whose text was returned, the last of equals; the last step if there is none.
function chosenStep(steps, text) {
  for (let i = steps.length - 1; i >= 0; i--) if (steps[i].text === text) return i;
  return Math.max(0, steps.length - 1);
}

// A token set on one line: breaks and lone spaces as signs, and nothing as the word for it.
const oneLine = text => !text ? "(empty)" : text.trim() ? text.replace(/\r?\n/g, "↵") : text.replace(/\n/g, "↵").replace(/ /g, "␣");
