// Runs the script of status.html in a browser of a few lines: node status_page.js URL TOKEN PAGE.
// Prints, after two polls, what the page shows; then what it shows with a wrong token.
"use strict";
const [url, token, file] = process.argv.slice(2);
const html = require("node:fs").readFileSync(file, "utf8");

function element() {
  return {
    textContent: "", hidden: false, value: "", children: [], listeners: {},
    append(child) { this.children.push(child); },
    replaceChildren(...all) { this.children = all; },
    addEventListener(kind, what) { this.listeners[kind] = what; },
    set innerHTML(_) { throw new Error("the page writes HTML"); },
  };
}

function open(hash) {
  const shown = {}, stored = new Map(), timers = [], urls = [];
  for (const [, id] of html.matchAll(/ id="(\w+)"/g)) shown[id] = element();
  const globals = {
    document: { getElementById: (id) => shown[id], createElement: element },
    sessionStorage: {
      getItem: (k) => stored.get(k) ?? null, setItem: (k, v) => stored.set(k, v),
      removeItem: (k) => stored.delete(k),
    },
    location: { hash, pathname: "/" },
    history: { replaceState: (_, __, to) => urls.push(to) },
    addEventListener: () => {},
    setTimeout: (what) => timers.push(what),
    fetch: (path, options) => fetch(url + path, options),
  };
  new Function(...Object.keys(globals), html.match(/<script>(.*?)<\/script>/s)[1])(
    ...Object.values(globals));
  return { shown, stored, timers, urls };
}

async function until(condition) {
  for (let i = 0; !condition(); i++) {
    if (i > 500) throw new Error("it did not come about");
    await new Promise((go) => setTimeout(go, 20));
  }
}

function texts({ shown, stored, urls }) {
  const fields = Object.entries(shown).map(([id, e]) => [id, e.textContent]);
  return {
    ...Object.fromEntries(fields),
    jobs: shown.jobs.children.map((row) => row.children.map((cell) => cell.textContent)),
    open: Object.keys(shown).filter((id) => ["login", "state"].includes(id) && !shown[id].hidden),
    stored: [...stored.values()], urls,
  };
}

(async () => {
  const good = open(`#token=${token}`);
  await until(() => good.timers.length === 1);
  good.timers.pop()();
  await until(() => good.timers.length === 1);
  const bad = open("#token=wrong");
  await until(() => bad.shown.problem.textContent);
  const none = open("");
  await until(() => !none.shown.login.hidden);
  none.shown.token.value = ` ${token} `;
  none.shown.login.listeners.submit({ preventDefault() {} });
  await until(() => none.timers.length === 1);
  console.log(JSON.stringify([good, bad, none].map(texts)));
})();
