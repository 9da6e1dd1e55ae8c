"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const make = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const nav = document.querySelector("nav");
  for (const section of document.querySelectorAll("section[id]")) {
    const link = make("a", section.querySelector("h2").textContent);
    link.href = "#" + section.id;
    nav.append(link, " ");
  }
  if (!find("data")) return;

  // A row: id, query, group, reference, what is wrong or right about it, and a system's part each.
  const [ID, QUERY, GROUP, REFERENCE, SIDE, SAID] = [0, 1, 2, 3, 4, 5];
  // A part: text, answer (null: none; 0: the text), stop reason, tokens, checks (1, 0, -).
  const [TEXT, ANSWER, STOP, TOKENS, CHECKS] = [0, 1, 2, 3, 4];
  const PAGE = 10, MOST = 400000, LEAST = 0.3;
  const data = JSON.parse(find("data").textContent);
  const teacher = data.systems.indexOf("teacher"), student = data.systems.indexOf("student");
  const answer = (part) => (part[ANSWER] === 0 ? part[TEXT] : part[ANSWER]);
  const compared = (part) => (data.free ? part[TEXT] : answer(part));
  const failed = (part) => [...part[CHECKS]].some((one) => one === "0");
  const filters = {
    "all rows": () => true,
    "teacher and student differ": (row) => compared(row[SAID][teacher]) !== compared(row[SAID][student]),
    "only the teacher is right": (row) => row[SIDE] === "teacher",
    "only the student is right": (row) => row[SIDE] === "student",
    "the student fails a check": (row) => failed(row[SAID][student]),
    "the student is cut off at the token limit": (row) => row[SAID][student][STOP] === "length",
    "the student gave no answer that can be read": (row) => row[SAID][student][ANSWER] === null,
  };
  const orders = {
    long: (row) => -row[SAID][student][TEXT].length,
    query: (row) => -row[QUERY].length,
  };
  let found = data.rows, at = 0, index = null;

  for (const [name, keep] of Object.entries(filters)) {
    const rows = data.rows.filter(keep).length;
    if (rows || keep === filters["all rows"]) {
      const option = make("option", `${name} (${rows.toLocaleString("en")})`);
      option.value = name;
      find("filter").append(option);
    }
  }
  data.systems.forEach((name, place) => {
    const label = make("label"), box = make("input");
    box.type = "checkbox";
    box.value = place;
    box.checked = ["teacher", "student", "base"].includes(name);
    label.append(box, name);
    find("shown").append(label);
  });

  // Which words of two texts are in both, in order.
  const words = (text) => text.match(/\S+\s*|\s+/gu) || [];
  function common(left, right) {
    const a = left.map((one) => one.trim()), b = right.map((one) => one.trim());
    let start = 0, end = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start++;
    while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
    const n = a.length - start - end, m = b.length - start - end;
    const both = [new Array(a.length).fill(true), new Array(b.length).fill(true)];
    both[0].fill(false, start, start + n);
    both[1].fill(false, start, start + m);
    if (n * m > MOST) return both;
    const best = new Uint16Array((n + 1) * (m + 1));
    for (let i = n - 1; i >= 0; i--)
      for (let j = m - 1; j >= 0; j--)
        best[i * (m + 1) + j] = a[start + i] === b[start + j]
          ? best[(i + 1) * (m + 1) + j + 1] + 1
          : Math.max(best[(i + 1) * (m + 1) + j], best[i * (m + 1) + j + 1]);
    for (let i = 0, j = 0; i < n && j < m; ) {
      if (a[start + i] === b[start + j]) {
        both[0][start + i++] = both[1][start + j++] = true;
      } else if (best[(i + 1) * (m + 1) + j] >= best[i * (m + 1) + j + 1]) i++;
      else j++;
    }
    return both;
  }
  function marked(text, other, tag) {
    const shown = make("div", undefined, "text");
    shown.dir = "auto";
    shown.tabIndex = 0;
    if (other === null || other === text) {
      shown.textContent = text || "(nothing)";
      return shown;
    }
    const mine = words(text), theirs = words(other), both = common(mine, theirs)[0];
    if (both.filter(Boolean).length < LEAST * Math.min(mine.length, theirs.length)) both.fill(true);
    for (let at = 0; at < mine.length; ) {
      let end = at;
      while (end < mine.length && both[end] === both[at]) end++;
      const part = mine.slice(at, end).join("");
      shown.append(both[at] ? part : make(tag, part));
      at = end;
    }
    if (!mine.length) shown.textContent = "(nothing)";
    return shown;
  }
  function part(row, place) {
    const one = row[SAID][place], box = make("div"), head = make("h4", data.systems[place]);
    const tag = (text, kind) => head.append(" ", make("span", text, "tag " + (kind || "")));
    if (!data.free && row[REFERENCE] !== null) {
      const right = answer(one) === row[REFERENCE];
      tag(right ? "✓ right" : "✗ not right", right ? "good" : "bad");
    }
    if (one[ANSWER] === null) tag("no answer that can be read", "bad");
    if (one[STOP] === "length") tag("cut off at the token limit", "bad");
    if (one[TOKENS] !== null) tag(`${one[TOKENS]} tokens`);
    const near = place === teacher ? student : teacher;
    const mine = place === near || near < 0 ? null : row[SAID][near][TEXT];
    box.append(head, marked(one[TEXT], mine, place === teacher ? "del" : "ins"));
    if (one[ANSWER] !== 0 && one[ANSWER] !== null) {
      const read = make("p", `read as: ${one[ANSWER]}`, "soft");
      read.dir = "auto";
      box.append(read);
    }
    const missed = data.checks.filter((_, check) => one[CHECKS][check] === "0");
    if (missed.length) box.append(make("p", `✗ fails ${missed.join(", ")}`, "tag bad"));
    return box;
  }
  function card(row) {
    const box = make("article", undefined, "row"), said = make("div", undefined, "said");
    const group = row[GROUP] && row[GROUP] !== row[ID] ? `, group ${row[GROUP]}` : "";
    box.append(make("h3", `row ${row[ID]}${group}`), marked(row[QUERY], null, ""));
    if (row[REFERENCE] !== null) {
      const known = make("p", `right: ${row[REFERENCE]}`, "soft");
      known.dir = "auto";
      box.append(known);
    }
    for (const input of find("shown").querySelectorAll("input:checked")) {
      said.append(part(row, Number(input.value)));
    }
    box.append(said);
    return box;
  }
  function draw() {
    const page = found.slice(at, at + PAGE);
    find("list").replaceChildren(...page.map(card));
    const count = found.length.toLocaleString("en");
    find("count").textContent = found.length
      ? `${(at + 1).toLocaleString("en")} to ${(at + page.length).toLocaleString("en")} of ${count} rows`
      : "No row is like that.";
    find("before").disabled = at === 0;
    find("after").disabled = at + PAGE >= found.length;
  }
  function choose() {
    const keep = filters[find("filter").value], sought = find("search").value.trim().toLowerCase();
    const places = [...data.rows.keys()].filter((place) => keep(data.rows[place]));
    if (sought) {
      index ||= data.rows.map((row) =>
        [row[ID], row[QUERY], row[REFERENCE], ...row[SAID].map((one) => one[TEXT])].join("\n").toLowerCase());
    }
    found = places.filter((place) => !sought || index[place].includes(sought)).map((place) => data.rows[place]);
    const order = orders[find("order").value];
    if (order) found.sort((a, b) => order(a) - order(b));
    at = 0;
    draw();
  }
  function turn(step) {
    at += step;
    draw();
    find("count").scrollIntoView();
  }
  find("before").addEventListener("click", () => turn(-PAGE));
  find("after").addEventListener("click", () => turn(PAGE));
  find("controls").addEventListener("submit", (event) => event.preventDefault());
  find("shown").addEventListener("change", draw);
  for (const name of ["filter", "order"]) find(name).addEventListener("change", choose);
  let waiting;
  find("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(choose, 150);
  });
  draw();
})();
