"use strict";
// Draws the page of text_page.html. All that comes from records goes through textContent,
// setAttribute or a number; none of it is ever markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const make = (tag, text, cls) => { const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
const within = (element, ...children) => { element.append(...children); return element; };
const svg = (tag, attributes) => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); return e; };
const plain = key => !(key.ctrlKey || key.metaKey || key.altKey);
const list = { places: [], rendered: 0, at: 0 }; // what is listed, and which of it is selected

function head() {
  document.title = data.name + " · rlalign decode";
  at("name").textContent = data.name;
  at("summary").replaceChildren(facts(data.summary));
  const left = [];
  if (data.without_trace) left.push(`${data.without_trace} records are here without their searches`);
  if (data.omitted) left.push(`${data.omitted} records are left out`);
  at("omitted").textContent = left.length ? left.join(", ") + ": the page would be too large." : "";
}

// ---- The list of records

function filter() {
  list.places = choose(data.records, at("kind").value, at("search").value);
  list.rendered = 0; list.at = 0;
  at("list").replaceChildren();
  at("count").textContent = `${list.places.length} of ${data.records.length}`;
  renderMore(PAGE);
  select(0, false);
}

function renderMore(until) {
  const end = Math.min(list.places.length, until);
  for (; list.rendered < end; list.rendered++) {
    const record = data.records[list.places[list.rendered]], item = make("div", undefined, "item " + outcome(record));
    item.setAttribute("role", "option"); item.setAttribute("aria-selected", "false");
    item.id = "item-" + list.rendered; item.dataset.place = list.rendered;
    item.append(make("b", record.id), make("span", promptText(record.prompt) || record.error, "line"),
      make("span", outcome(record) || short(record.reward), "mark"));
    at("list").append(item);
  }
}

function select(place, scroll) {
  renderMore(place + 1);
  const before = at("item-" + list.at), now = at("item-" + place);
  if (before) before.setAttribute("aria-selected", "false");
  list.at = place;
  if (!now) { at("record").replaceChildren(make("p", "No record is like this.", "soft")); return; }
  now.setAttribute("aria-selected", "true");
  at("list").setAttribute("aria-activedescendant", now.id);
  if (scroll) now.scrollIntoView({ block: "nearest" });
  show(data.records[list.places[place]]);
}

function lists() {
  const box = at("list");
  box.addEventListener("click", event => { const item = event.target.closest("[data-place]");
    if (item) select(+item.dataset.place, false); });
  box.addEventListener("scroll", () => {
    if (box.scrollTop + box.clientHeight > box.scrollHeight - 200) renderMore(list.rendered + PAGE); });
  box.addEventListener("keydown", event => {
    const to = moveTo(list.at, list.places.length, event.key);
    if (to === null || !plain(event)) return;
    event.preventDefault(); select(to, true); });
  at("search").addEventListener("input", filter); at("kind").addEventListener("input", filter);
}

// ---- One record

const TRACES = { best_of_n: samples, majority: votes, latent_seek: latentPath, rain: searchTree, logit_fusion: fusion };

function show(record) {
  const box = at("record"), trace = record.trace, draw = trace && TRACES[trace.method];
  box.replaceChildren(make("h2", record.id), make("pre", promptText(record.prompt), "prompt"));
  if (record.error) { box.append(make("p", record.error, "bad")); return; }
  box.append(facts([["answer", record.answer], ["right", record.right === undefined ? undefined : record.right ? "yes" : "no"],
    ["reward", finite(record.reward) ? short(record.reward) : undefined], ["stopped", record.stop_reason],
    ["text", record.finish === "length" ? "cut off" : "complete"],
    ["tokens generated", record.num_generated_tokens], ["tokens read", record.num_prefill_tokens],
    ["requests", record.num_engine_calls], ["texts scored", record.num_reward_calls],
    ["seconds", short(record.wall_s)], ...Object.entries(record.counters || {}).filter(([, value]) => value)]));
  if (BUDGETS.includes(record.stop_reason)) box.append(make("p", "A budget ended the search: this is the best so far.", "note"));
  box.append(make("pre", record.text, "text " + outcome(record)));
  if (draw) box.append(draw(trace, record));
  else if (trace === null) box.append(make("p", "The search is left out: the page would be too large.", "soft"));
}

function facts(pairs) {
  return within(make("dl"), ...pairs.filter(([, value]) => value !== undefined && value !== null).map(([name, value]) =>
    within(make("div"), make("dt", name), make("dd", typeof value === "object" ? JSON.stringify(value) : String(value)))));
}

const section = (title, ...children) => within(make("section"), make("h3", title), ...children);

function button(label, act, name) {
  const b = make("button", label); b.type = "button"; if (name) b.setAttribute("aria-label", name);
  b.addEventListener("click", act); return b;
}

// A bar whose length is a share of 1.
function bar(share) {
  const inner = make("i"); inner.style.width = Math.round(100 * Math.max(0, Math.min(1, share))) + "%";
  return within(make("span", undefined, "bar"), inner);
}

function sampleItems(all, chosen, keep) {
  const rewards = all.map(s => s.reward).filter(finite), low = Math.min(...rewards), high = Math.max(...rewards);
  return all.map((sample, i) => [sample, i]).filter(([sample]) => keep(sample)).map(([sample, i]) => {
    const summary = within(make("summary"), make("b", String(i + 1)));
    if (finite(sample.reward)) summary.append(bar(high > low ? (sample.reward - low) / (high - low) : 1), make("span", short(sample.reward), "value"));
    if (sample.answer !== undefined) summary.append(make("span", sample.answer === null ? "no answer" : "answer " + sample.answer, "soft"));
    if (i === chosen) summary.append(make("span", "returned", "good"));
    const item = within(make("details", undefined, "sample"), summary, make("pre", sample.text));
    item.open = i === chosen; return item;
  });
}

const chosenOf = (trace, record) => trace.samples.findIndex(s => s.text === record.text &&
  (!finite(record.reward) || s.reward === record.reward));

function samples(trace, record) {
  return section(`${trace.samples.length} samples`, ...sampleItems(trace.samples, chosenOf(trace, record), () => true));
}

// Answers by their votes; one that is pressed shows its samples alone.
function votes(trace, record) {
  const top = Math.max(...trace.answers.map(a => a.votes || 0)), below = make("div"), chosen = chosenOf(trace, record);
  const rows = trace.answers.map(entry => {
    const b = button("", () => pick(b), `samples with answer ${entry.answer}`);
    within(b, make("span", entry.answer), bar(top > 0 ? entry.votes / top : 0), make("span", short(entry.votes), "value"));
    b.className = "vote"; b.setAttribute("aria-pressed", "false"); return b; });
  const pick = pressed => {
    const off = !pressed || pressed.getAttribute("aria-pressed") === "true";
    rows.forEach(row => row.setAttribute("aria-pressed", String(!off && row === pressed)));
    const group = off ? null : trace.answers[rows.indexOf(pressed)];
    const same = s => !group || (group.samples ? group.samples.includes(trace.samples.indexOf(s)) : s.answer === group.answer);
    below.replaceChildren(...sampleItems(trace.samples, chosen, same)); };
  pick(null);
  return section(`${trace.answers.length} answers of ${trace.samples.length} samples`, ...rows, below);
}

function fusion(trace) {
  const alphas = trace.alphas || [], known = alphas.filter(finite), counts = new Map();
  for (const e of trace.experts || []) counts.set(e, (counts.get(e) || 0) + 1);
  const mean = known.reduce((a, b) => a + b, 0) / known.length;
  return section("strength at each token", chart(alphas, "alpha").plot,
    facts([["mean", short(mean)], ["largest", short(Math.max(...known))],
      ...[...counts].sort((a, b) => a[0] - b[0]).map(([e, n]) => [e < 0 ? "no expert" : `expert ${e + 1}`, `${n} tokens`])]));
}

// A curve with a dot for each value; `choose(i)` is told of the one that is clicked.
function chart(values, label, choose) {
  const W = 640, H = 130, points = curvePoints(values, W, H, 14), known = values.filter(finite);
  const plot = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", class: "chart",
    "aria-label": `${label}: ${values.length} values, ${short(Math.min(...known))} to ${short(Math.max(...known))}` });
  let line = "", up = true;
  for (const p of points) { if (p) line += (up ? "M" : "L") + p[0] + " " + p[1]; up = !p; }
  plot.append(svg("path", { d: line, class: "line" }));
  const dots = points.map((p, i) => {
    if (!p) return null;
    const dot = svg("circle", { cx: p[0], cy: p[1], r: values.length > 80 ? 2 : 4.5, class: "dot" });
    dot.append(svg("title", {})); dot.firstChild.textContent = `${i}: ${short(values[i])}`;
    if (choose) { dot.setAttribute("data-step", i); dot.addEventListener("click", () => choose(i)); }
    plot.append(dot); return dot; });
  return { plot, dots };
}
