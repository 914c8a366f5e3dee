"use strict";
// The page of the inspection service: four views, drawn from /api, kept live by server-sent events.

const RECENT = 120, FILM = 12, AT_ONCE = 60, REDRAW = 250;
const state = { models: [], recent: {}, opacity: 0.7, boxes: true, queue: [], filter: {}, course: 10000 };
const view = document.getElementById("view");
const WORD = { true: "anomalous", false: "normal", null: "none" };
const TITLE = { true: "Anomalous", false: "Normal", null: "Not judged" };
const verdictOf = (part) => WORD[part.is_anomalous];
const count = (n) => n.toLocaleString("en");
const figure = (x) => (x === null ? "not a number" : Math.abs(x) >= 1000 ? x.toPrecision(4) : x.toFixed(3));
const address = (part, what) => `api/verdicts/${part.id}/${what}`;

// ---- small tools -------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const svg = ["svg", "rect", "line", "polyline", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !svg) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

async function ask(path, options = {}) {
  const body = options.json === undefined ? {} : { body: JSON.stringify(options.json) };
  const answer = await fetch(path, { ...options, ...body });
  const found = await answer.json().catch(() => ({}));
  if (answer.status === 401) showLogin();
  if (!answer.ok) throw new Error(found.error || `${answer.status} ${answer.statusText}`);
  return found;
}

let noticeTimer;
function notice(text) {
  const place = document.getElementById("notice");
  place.textContent = text;
  place.hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => (place.hidden = true), 6000);
}

const failed = (error) => notice(error.message || String(error));
const chosen = () => document.getElementById("model").value;
const shownModels = () => state.models.filter((model) => !chosen() || model.name === chosen());
const when = (part) => new Date(part.time).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit" });
const clock = (part) => new Date(part.time).toLocaleTimeString();

function stage(part, { small = false, opacity = state.opacity, boxes = true } = {}) {
  const [height, width] = part.source_size;
  if (part.has_picture === false) return make("div", { className: "stage" }, make("span", { className: "gone" }, "picture not kept"));
  const picture = make("img", { src: address(part, small ? "thumbnail" : "picture"), alt: part.name || `part ${part.id}` });
  const map = make("img", { src: address(part, "map"), alt: "", className: "heat" });
  map.style.opacity = opacity;
  map.addEventListener("error", () => map.remove());
  picture.addEventListener("error", () => picture.replaceWith(make("span", { className: "gone" }, "picture not kept")));
  const outline = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "boxes" });
  for (const { box: [x0, y0, x1, y1] } of part.boxes)
    for (const kind of ["under", "over"])
      outline.append(make("rect", { class: kind, x: x0, y: y0, width: x1 - x0, height: y1 - y0 }));
  if (!boxes) outline.style.display = "none";
  // The map covers the picture itself, not the bars beside it.
  map.style.objectFit = "fill";
  const place = make("div", { className: "stage" }, picture, map, outline);
  const fit = () => {
    const { clientWidth: w, clientHeight: h } = place;
    if (!w || !h) return;
    const scale = Math.min(w / width, h / height);
    Object.assign(map.style, {
      width: `${width * scale}px`, height: `${height * scale}px`,
      left: `${(w - width * scale) / 2}px`, top: `${(h - height * scale) / 2}px`, right: "auto", bottom: "auto",
    });
  };
  new ResizeObserver(fit).observe(place);
  return place;
}

const tag = (part) => make("span", { className: `tag ${verdictOf(part)}` }, TITLE[part.is_anomalous]);
const reviewTag = (part) => (part.review ? make("span", { className: `tag ${part.review}` }, part.review) : null);

// ---- live --------------------------------------------------------------------------------------

function strip(parts, threshold) {
  const width = 600, height = 110;
  const scores = parts.map((part) => part.score).filter((score) => score !== null);
  const low = Math.min(0, ...scores), most = Math.max(...scores, low + 1e-6);
  const high = threshold > 0 ? Math.min(Math.max(1.6 * threshold, most), 3 * threshold) : most; // higher ones are cut
  const y = (score) => height - 5 - ((Math.min(score, high) - low) / (high - low)) * (height - 12);
  const step = width / RECENT;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `scores of the last ${parts.length} parts` });
  parts.forEach((part, i) => {
    const top = part.score === null ? 2 : y(part.score), x = (RECENT - parts.length + i) * step;
    const bar = make("rect", { class: verdictOf(part), x: x + 0.5, width: Math.max(1, step - 1), y: top, height: height - top });
    bar.append(make("title", {}, `${figure(part.score)}, ${clock(part)}`));
    svg.append(bar);
  });
  if (threshold !== null) svg.append(make("line", { x1: 0, x2: width, y1: y(threshold), y2: y(threshold) }));
  return svg;
}

function panel(model, alone) {
  const parts = state.recent[model.name] || [], last = parts[parts.length - 1];
  const share = model.parts ? ` (${((100 * model.anomalous) / model.parts).toFixed(1)} %)` : "";
  const head = make("div", { className: "head" }, make("h2", {}, model.name), make("span", { className: "space" }),
    make("span", { className: "soft small number" }, `${count(model.parts)} parts, ${count(model.anomalous)} anomalous${share}`));
  const box = make("section", { className: `card panel${alone ? " one" : ""}` });
  box.dataset.model = model.name;
  if (!last) {
    box.className = "card panel";
    box.append(head, make("div", { className: "empty" }, make("b", {}, "No picture yet"), "Send one: ",
      make("code", {}, `curl --data-binary @part.png ${location.origin}/predict/${model.name}`)));
    return box;
  }
  const says = make("div", { className: `verdict ${verdictOf(last)}` },
    make("b", {}, TITLE[last.is_anomalous]),
    make("span", { className: "number" }, make("b", {}, figure(last.score)),
      make("span", { className: "soft small" }, model.threshold === null ? "no threshold" : `threshold ${figure(last.threshold)}`)));
  const picture = stage(last);
  picture.addEventListener("click", () => (location.hash = `part/${last.id}`));
  const film = make("div", { className: "film" }, ...parts.slice(-FILM - 1, -1).reverse().map((part) =>
    make("a", { href: `#part/${part.id}`, className: verdictOf(part), title: `${figure(part.score)}, ${clock(part)}` },
      stage(part, { small: true, opacity: 0.55 }))));
  const scores = make("div", { className: "strip" }, strip(parts, model.threshold));
  if (alone) box.append(picture, head, says, scores, film);
  else box.append(head, picture, says, scores, film);
  return box;
}

function showLive() {
  const models = shownModels();
  view.replaceChildren(make("div", { className: "panels" }, ...models.map((model) => panel(model, models.length === 1))));
}

// ---- history -----------------------------------------------------------------------------------

function card(part) {
  return make("a", { href: `#part/${part.id}`, className: "card part" }, stage(part, { small: true, opacity: 0.55 }),
    make("span", { className: "text" },
      make("span", { className: "row" }, tag(part), make("span", { className: "number" }, figure(part.score))),
      make("span", { className: "row small" }, make("span", { className: "soft name" }, part.name || `part ${part.id}`), reviewTag(part)),
      make("span", { className: "soft small" }, `${when(part)}${state.models.length > 1 ? `, ${part.model}` : ""}`)));
}

function query(more = {}) {
  const { verdict, review, since, until } = { ...state.filter, ...more };
  const values = { model: chosen(), verdict, review, limit: more.limit || AT_ONCE, before: more.before };
  if (since) values.since = new Date(`${since}T00:00`).toISOString();
  if (until) values.until = new Date(new Date(`${until}T00:00`).getTime() + 864e5).toISOString();
  const words = Object.entries(values).filter(([, value]) => value !== undefined && value !== "");
  return `api/verdicts?${new URLSearchParams(words)}`;
}

async function showHistory() {
  const pick = (name, title, choices) => make("label", {}, title, make("select", {
    name, onchange: (event) => { state.filter[name] = event.target.value; showHistory().catch(failed); },
  }, ...choices.map(([value, text]) => make("option", { value, selected: (state.filter[name] || "") === value }, text))));
  const day = (name, title) => make("label", {}, title, make("input", {
    type: "date", name, value: state.filter[name] || "",
    onchange: (event) => { state.filter[name] = event.target.value; showHistory().catch(failed); },
  }));
  const { verdicts } = await ask(query());
  if (route()[0] !== "history") return;
  const grid = make("div", { className: "grid" }, ...verdicts.map(card));
  state.queue = verdicts.map((part) => part.id);
  const more = make("button", { className: "more", hidden: verdicts.length < AT_ONCE, onclick: async () => {
    const { verdicts: older } = await ask(query({ before: state.queue[state.queue.length - 1] }));
    grid.append(...older.map(card));
    state.queue.push(...older.map((part) => part.id));
    more.hidden = older.length < AT_ONCE;
  } }, "Older parts");
  view.replaceChildren(
    make("div", { className: "filters" },
      pick("verdict", "Verdict", [["", "all"], ["anomalous", "anomalous"], ["normal", "normal"], ["none", "not judged"]]),
      pick("review", "Review", [["", "all"], ["open", "not reviewed"], ["good", "good"], ["bad", "bad"], ["unsure", "unsure"]]),
      day("since", "From"), day("until", "To"),
      make("button", { onclick: () => { state.filter = {}; showHistory().catch(failed); } }, "All parts"),
      make("button", { id: "fresh", hidden: true, onclick: () => showHistory().catch(failed) }, "New parts")),
    verdicts.length ? grid : make("div", { className: "card empty" }, make("b", {}, "No part fits"), "Change the filters, or send a picture."),
    more);
}

// ---- one part, and the review of rejects -------------------------------------------------------

function answers(part, after) {
  const button = (word, key) => make("button", {
    className: word, "aria-pressed": String(part.review === word), onclick: () => say(part, word, after).catch(failed),
  }, word[0].toUpperCase() + word.slice(1), make("kbd", {}, key));
  return make("div", { className: "answers" }, button("good", "G"), button("bad", "B"), button("unsure", "U"));
}

async function say(part, word, after) {
  const review = part.review === word ? null : word;
  await ask(address(part, "review"), { method: "POST", json: { review } });
  part.review = review;
  after(review);
}

function partView(part, { after, previous, next, title }) {
  const picture = stage(part, { boxes: state.boxes });
  const slider = make("input", { type: "range", min: 0, max: 1, step: 0.01, value: state.opacity, "aria-label": "Opacity of the map",
    oninput: (event) => { state.opacity = Number(event.target.value); picture.querySelector(".heat")?.style.setProperty("opacity", state.opacity); } });
  const boxes = make("input", { type: "checkbox", checked: state.boxes, onchange: (event) => {
    state.boxes = event.target.checked;
    picture.querySelector(".boxes").style.display = state.boxes ? "" : "none";
  } });
  const gauge = make("div", { className: `gauge ${verdictOf(part)}` }, make("i"), part.threshold === null ? null : make("u"));
  const reach = part.score === null || part.threshold === null ? 1 : Math.max(0.02, Math.min(1, part.score / (2 * part.threshold)));
  gauge.firstChild.style.width = `${100 * reach}%`;
  const facts = [["part", part.id], ["name", part.name || "none"], ["model", part.model], ["time", when(part)],
    ["size", `${part.source_size[1]} x ${part.source_size[0]}`]];
  const defects = part.boxes.map(({ area, score }, i) => make("li", {}, `defect ${i + 1}`,
    make("span", { className: "soft number" }, `${count(area)} px, ${figure(score)}`)));
  state.keys = {
    g: () => say(part, "good", after).catch(failed), b: () => say(part, "bad", after).catch(failed),
    u: () => say(part, "unsure", after).catch(failed), ArrowLeft: previous, ArrowRight: next,
  };
  view.replaceChildren(make("div", { className: "one-part" }, picture, make("div", { className: "side" },
    title ? make("h1", {}, title) : null,
    make("div", { className: "pager" }, make("button", { disabled: !previous, onclick: previous || (() => {}) }, "\u2190 Newer"),
      make("button", { disabled: !next, onclick: next || (() => {}) }, "Older \u2192")),
    make("div", { className: "card" }, tag(part), make("div", { className: "score number" }, figure(part.score)), gauge,
      make("span", { className: "soft small" }, part.threshold === null ? "no threshold" : `threshold ${figure(part.threshold)}`),
      answers(part, after)),
    make("div", { className: "card" }, make("span", { className: "soft small" }, "Opacity of the map"), slider,
      make("label", { className: "check" }, boxes, "Boxes"), make("ul", { className: "defects" }, ...defects)),
    make("div", { className: "card" }, make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))])),
      make("a", { className: "save", href: address(part, "file"), download: "" }, "Save the file")))));
}

async function showPart(id) {
  const part = await ask(`api/verdicts/${id}`);
  if (route()[1] !== String(id)) return;
  let place = state.queue.indexOf(part.id);
  if (place < 0) {
    const { verdicts } = await ask(query({ before: part.id }));
    state.queue = [part.id, ...verdicts.map((one) => one.id)];
    place = 0;
  }
  const to = (at) => (at >= 0 && at < state.queue.length ? () => (location.hash = `part/${state.queue[at]}`) : null);
  partView(part, { after: () => showPart(id).catch(failed), previous: to(place - 1), next: to(place + 1) });
}

async function showReview(from = null) {
  const { verdicts } = await ask(query({ verdict: "anomalous", review: "open", since: "", until: "", limit: 100 }));
  if (route()[0] !== "review") return;
  if (!verdicts.length) {
    state.keys = {};
    view.replaceChildren(make("div", { className: "card empty" }, make("b", {}, "Every reject is reviewed"),
      "What was learned of them shows under ", make("a", { href: "#threshold" }, "Threshold"), "."));
    return;
  }
  let at = from === null ? 0 : verdicts.findIndex((part) => part.id < from);
  if (at < 0) at = 0;
  const show = (place) => {
    const part = verdicts[place];
    const open = shownModels().reduce((sum, model) => sum + model.open, 0);
    partView(part, {
      title: `${count(Math.max(open, verdicts.length))} to review`,
      after: () => showReview(part.id).catch(failed),
      previous: place > 0 ? () => show(place - 1) : null,
      next: place + 1 < verdicts.length ? () => show(place + 1) : null,
    });
    view.querySelector(".pager").after(make("p", { className: "hint soft small" }, make("kbd", {}, "G"), " good ", make("kbd", {}, "B"), " bad ",
      make("kbd", {}, "U"), " unsure ", make("kbd", {}, "\u2190"), " ", make("kbd", {}, "\u2192"), " skip"));
  };
  show(at);
}

// ---- threshold ---------------------------------------------------------------------------------

function bars(found, model) {
  const width = 1000, height = 230, bins = found.counts.open.length, step = width / bins;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": "histogram of scores" });
  const totals = found.counts.open.map((_, i) => Object.values(found.counts).reduce((sum, list) => sum + list[i], 0));
  const most = Math.max(1, ...totals), tall = (n) => (n ? Math.max(3, Math.sqrt(n / most) * (height - 10)) : 0);
  totals.forEach((total, i) => {
    let base = height;
    for (const kind of ["open", "good", "unsure", "bad"]) {
      const n = found.counts[kind][i], part = total ? (tall(total) * n) / total : 0;
      if (!n) continue;
      base -= part;
      const bar = make("rect", { class: `bar-${kind}`, x: i * step + 0.8, width: step - 1.6, y: base, height: part });
      const low = found.low + (i * (found.high - found.low)) / bins;
      bar.append(make("title", {}, `${count(n)} ${kind === "open" ? "not reviewed" : kind}, from ${figure(low)}`));
      svg.append(bar);
    }
  });
  const x = (score) => ((score - found.low) / (found.high - found.low)) * width;
  const line = (kind, score) => make("line", { class: kind, x1: x(score), x2: x(score), y1: 0, y2: height });
  if (model.threshold !== null) svg.append(line("now", model.threshold));
  const wanted = line("wanted", model.threshold ?? found.high);
  svg.append(wanted);
  return { svg, move: (score) => ["x1", "x2"].forEach((name) => wanted.setAttribute(name, x(score))) };
}

async function decision(model) {
  const path = `api/models/${encodeURIComponent(model.name)}`;
  const found = await ask(`${path}/histogram`);
  const { svg, move } = bars(found, model);
  const start = model.threshold ?? found.high, step = (found.high - found.low) / 1000;
  const slider = make("input", { type: "range", min: found.low, max: found.high, step, value: start, "aria-label": `Threshold of ${model.name}` });
  const exact = make("input", { type: "number", step: "any", value: Number(start.toPrecision(6)) });
  const says = make("p", { className: "says number", role: "status" });
  const also = make("p", { className: "soft number" });
  const because = make("p", { className: "because", hidden: true });
  const use = make("button", { className: "main", disabled: true, onclick: () => put(wanted) }, "Use this threshold");
  let wanted = start, asked = 0;

  async function consider(value, from) {
    wanted = value;
    if (from !== slider) slider.value = value;
    if (from !== exact) exact.value = Number(value.toPrecision(6));
    move(value);
    use.disabled = value === model.threshold;
    const turn = ++asked;
    const told = await ask(`${path}/what-if?threshold=${value}`);
    if (turn !== asked) return;
    says.textContent = `${count(told.rejected)} of ${count(told.parts)} parts would be rejected, ` +
      `${count(told.rejected_bad)}${told.rejected > 1 ? " of them" : ""} confirmed bad.`;
    also.textContent = `${count(told.rejected_good)} confirmed good and ${count(told.rejected_unsure)} unsure would be rejected; ${count(told.passed_bad)} confirmed bad would pass.`;
  }
  async function put(threshold) {
    await ask(`${path}/threshold`, { method: "PUT", json: { threshold } }).then(() => notice(
      threshold === null ? "The detector's own threshold is back." : `Judged by ${figure(threshold)} from now on.`), failed);
    await loadModels();
    await showThreshold();
  }
  async function propose() {
    const told = await ask(`${path}/recalibration?rate=${Number(rate.value) / 100}`);
    because.hidden = false;
    because.textContent = `${figure(told.threshold)}: ${count(told.above)} of ${count(told.good)} good parts lie above it ` +
      `(${count(told.reviewed_good)} reviewed as good, the others passed). With 95 % confidence at most ${(100 * told.bound).toFixed(2)} % of good parts will. ` +
      (told.left_out ? `Left out, without a clear review: ${count(told.left_out)}.` : "");
    await consider(told.threshold);
  }
  const rate = make("input", { type: "number", min: 0, max: 50, step: "any", value: 1 });
  slider.addEventListener("input", () => consider(Number(slider.value), slider).catch(failed));
  exact.addEventListener("change", () => Number.isFinite(exact.valueAsNumber) && consider(exact.valueAsNumber, exact).catch(failed));
  await consider(start);
  const key = (kind, text) => make("span", {}, make("i", { className: kind }), text);
  return make("section", { className: "card decide" },
    make("div", { className: "head" }, make("h2", {}, model.name), make("span", { className: "soft" },
      model.threshold === null ? "has no threshold" : `threshold ${figure(model.threshold)}`,
      model.own_threshold !== null && model.own_threshold !== model.threshold ? ` (the detector's own is ${figure(model.own_threshold)})` : ""),
      make("span", { className: "space" }),
      make("span", { className: "legend" }, key("open", "not reviewed"), key("good", "good"), key("unsure", "unsure"), key("bad", "bad"))),
    svg, slider, make("div", { className: "axis number" }, make("span", {}, figure(found.low)),
      make("span", {}, "score; heights grow with the square root of the count"), make("span", {}, `${figure(found.high)} and above`)),
    says, also, because,
    make("div", { className: "tools" }, make("label", {}, "Threshold", exact), use,
      make("button", { disabled: model.own_threshold === model.threshold, onclick: () => put(null) }, "Back to the detector's own"),
      make("span", { className: "space" })),
    make("div", { className: "tools" }, make("label", {}, "False rejects, %", rate),
      make("button", { onclick: () => propose().catch(failed) }, "Recalibrate with the reviewed parts"),
      make("a", { className: "button", href: `${path}/good-parts.zip`, download: "" }, `Export reviewed good parts (${count(model.good)})`)));
}

async function showThreshold() {
  const sections = await Promise.all(shownModels().map(decision));
  if (route()[0] === "threshold") view.replaceChildren(...sections);
}

// ---- drift -------------------------------------------------------------------------------------

const COURSES = [[1000, "1,000"], [10000, "10,000"], [100000, "100,000"]];

function ticks(low, high) { // round numbers, some five of them
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push([i * step, (i * step).toFixed(Math.max(0, -Math.floor(Math.log10(step))))]);
  return found;
}

function scoreRange({ stretches, calibration, threshold }) {
  const highs = stretches.map((one) => one.high).filter((x) => x !== null);
  const marks = [threshold, calibration?.high, ...highs].filter((x) => x !== null && x !== undefined);
  let top = Math.max(1e-6, ...marks);
  if (threshold > 0) top = Math.min(top, 2 * threshold); // higher ones are cut
  const low = Math.min(0, calibration?.low ?? 0, ...stretches.map((one) => one.median ?? 0));
  return [low, low + 1.08 * (top - low)];
}

function meanRange({ stretches, calibration }) {
  const band = calibration?.map_mean, values = stretches.map((one) => one.map_mean).filter((x) => x !== null);
  const all = band ? [...values, band.low, band.high] : values, low = Math.min(...all), high = Math.max(...all);
  const room = 0.15 * (high - low) || 1e-3;
  return [low - room, high + room];
}

function courseChart(found, { title, kind, keys, band, limit, range: [low, high], since }) {
  const width = 1000, height = 300, { stretches } = found;
  const y = (value) => height - ((Math.min(value, high) - low) / (high - low)) * height;
  const total = Math.max(1, found.parts);
  const places = []; // left edge and width of each stretch: as wide as it has parts
  stretches.reduce((sum, one) => { places.push([(sum / total) * width, (one.parts / total) * width]); return sum + one.parts; }, 0);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `course of the ${title}` });
  const scale = ticks(low, high).filter(([value]) => y(value) > 4);
  svg.append(...scale.map(([value]) => make("line", { class: "tick", x1: 0, x2: width, y1: y(value), y2: y(value) })));
  if (band) {
    svg.append(make("rect", { class: "band", x: 0, width, y: y(band.high), height: Math.max(1, y(band.low) - y(band.high)) }));
    svg.append(make("line", { class: "middle", x1: 0, x2: width, y1: y(band.median), y2: y(band.median) }));
  }
  const path = (key) => {
    const known = stretches.map((one, i) => [places[i][0] + places[i][1] / 2, one[key]]).filter(([, value]) => value !== null);
    const points = known.length === 1 ? [[0, known[0][1]], [width, known[0][1]]] : known; // one point would not show
    return points.map(([x, value]) => `${x.toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  };
  svg.append(...keys.map(([key, kind]) => make("polyline", { class: kind, points: path(key) })));
  if (limit !== null) svg.append(make("line", { class: "limit", x1: 0, x2: width, y1: y(limit), y2: y(limit) }));
  const marked = [];
  if (since) {
    const at = stretches.findIndex((one) => one.last >= since.id);
    const [x, wide] = places[at], part = stretches[at];
    const inside = part.last > part.first ? (since.id - part.first) / (part.last - part.first) : 0;
    const place = x + wide * inside;
    svg.append(make("line", { class: "since", x1: place, x2: place, y1: 0, y2: height }));
    const right = place > 0.75 * width; // the words beside the line, where there is room
    marked.push(make("span", { className: `mark since${right ? " right" : ""}`, style: right ? `right:${100 - place / 10}%` : `left:${place / 10}%` }, "drift since here"));
  }
  stretches.forEach((one, i) => {
    const bar = make("rect", { class: "stretch", x: places[i][0], width: places[i][1], y: 0, height });
    bar.append(make("title", {}, `${when({ time: one.from })} to ${when({ time: one.to })}: ${count(one.parts)} parts, ${count(one.anomalous)} anomalous` +
      (one.median === null ? "" : `, median ${figure(one.median)}, 95 % below ${figure(one.high)}`) +
      (one.map_mean === null ? "" : `, map's mean ${figure(one.map_mean)}`)));
    bar.addEventListener("click", () => (location.hash = `part/${one.last}`));
    svg.append(bar);
  });
  return make("div", { className: `chart ${kind}` }, make("div", { className: "what soft" }, title),
    make("div", { className: "scale number" }, ...scale.map(([value, text]) => make("span", { style: `top:${(100 * y(value)) / height}%` }, text))),
    make("div", { className: "plot" }, svg, ...marked));
}

function courseCharts(found) {
  const { stretches, calibration, threshold, drift } = found, charts = [courseChart(found, {
    title: "score", kind: "tall", keys: [["high", "high"], ["median", "median"]], band: calibration, limit: threshold,
    range: scoreRange(found), since: drift?.score?.since })];
  if (stretches.some((one) => one.map_mean !== null)) charts.push(courseChart(found, {
    title: "mean of the map", kind: "low", keys: [["map_mean", "median"]], band: calibration?.map_mean, limit: null,
    range: meanRange(found), since: drift?.map_mean?.since }));
  const last = charts[charts.length - 1];
  last.append(make("div", { className: "axis number" }, make("span", {}, when({ time: stretches[0].from })),
    make("span", {}, `${count(stretches.length)} stretches of about ${count(Math.round(found.parts / stretches.length))} parts`),
    make("span", {}, when({ time: stretches[stretches.length - 1].to }))));
  return charts;
}

function driftSays({ drift, reason, parts, stretches }, asked) {
  if (!drift) return ["No comparison.", reason, ""];
  const chance = (p) => (p < 0.001 ? "less than 0.001" : p.toFixed(3));
  const above = `${count(drift.above)} of ${count(drift.images)} parts lie above the threshold; that many good ones would lie there with a chance of ${chance(drift.above_chance)}.`;
  if (drift.drifted === null) return ["No verdict: nearly all parts lie above the threshold.", `${above} Look at the parts: bad ones, or another light.`, "drifted"];
  const figures = [["score", drift.score], ["map's mean", drift.map_mean]].filter(([, one]) => one);
  const test = `Below the threshold, ${count(drift.compared)} parts against ${count(drift.reference)} of the calibration. ` +
    figures.map(([name, one]) => `${name[0].toUpperCase()}${name.slice(1)}: distance ${one.distance.toFixed(3)}, p-value ${chance(one.p_value)}, median ${figure(one.medians[1])} against ${figure(one.medians[0])}`).join(". ") + ".";
  if (!drift.since) return ["No drift.", `${test} ${above}`, "steady"];
  const before = parts === asked && drift.since.id <= stretches[0].last ? ", or before" : "";
  const of = figures.filter(([, one]) => one.since).map(([name]) => name).join(" and ");
  return [`Drift of the ${of} since part ${count(drift.since.id)}, ${when(drift.since)}${before}.`, `${test} ${above}`, "drifted"];
}

async function courseCard(model, parts) {
  const found = await ask(`api/models/${encodeURIComponent(model.name)}/course?parts=${parts}`);
  const head = make("div", { className: "head" }, make("h2", {}, model.name),
    make("span", { className: "soft" }, found.parts ? `the last ${count(found.parts)} parts` : "no part yet"));
  if (!found.parts) return make("section", { className: "card decide" }, head);
  const key = (kind, text) => make("span", {}, make("i", { className: kind }), text);
  const [says, because, kind] = driftSays(found, parts), { calibration, threshold } = found;
  const open = found.drift?.since ? make("a", { className: "button", href: `#part/${found.drift.since.id}` }, "Look at the first part of it") : null;
  head.append(make("span", { className: "space" }), make("span", { className: "legend" }, key("median", "median"), key("high", "95 % quantile"),
    calibration ? key("band", "calibration, 5 to 95 %") : null, threshold === null ? null : key("limit", `threshold ${figure(threshold)}`)));
  return make("section", { className: "card decide course" }, head, make("p", { className: `says number ${kind}`, role: "status" }, says),
    ...courseCharts(found), make("p", { className: "because number" }, because), open);
}

async function showDrift() {
  const parts = state.course;
  const cards = await Promise.all(shownModels().map((model) => courseCard(model, parts)));
  if (route()[0] !== "drift" || parts !== state.course) return;
  const select = make("select", { onchange: (event) => { state.course = Number(event.target.value); showDrift().catch(failed); } },
    ...COURSES.map(([value, text]) => make("option", { value, selected: value === parts }, text)));
  view.replaceChildren(make("div", { className: "filters" }, make("label", {}, "Newest parts, at most", select),
    make("button", { id: "fresh", hidden: true, onclick: () => showDrift().catch(failed) }, "New parts")), ...cards);
}

// ---- frame -------------------------------------------------------------------------------------

const route = () => (location.hash.slice(1) || "live").split("/");
const VIEWS = { live: showLive, review: showReview, history: showHistory, threshold: showThreshold, drift: showDrift, part: (id) => showPart(Number(id)) };

function show() {
  const [name, value] = route();
  state.keys = {};
  document.querySelectorAll("nav a").forEach((link) => {
    if (link.hash === `#${name === "part" ? "history" : name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  Promise.resolve((VIEWS[name] || showLive)(value)).catch(failed);
}

function showCounts() {
  const open = shownModels().reduce((sum, model) => sum + model.open, 0), badge = document.getElementById("open");
  badge.textContent = count(open);
  badge.hidden = !open;
}

async function loadModels() {
  state.models = (await ask("api/models")).models;
  const select = document.getElementById("model"), before = select.value;
  const names = state.models.map((model) => model.name);
  if (select.options.length !== names.length + 1) {
    select.replaceChildren(make("option", { value: "" }, "all models"), ...names.map((name) => make("option", { value: name }, name)));
    select.value = names.includes(before) ? before : "";
  }
  document.getElementById("which").hidden = names.length < 2;
  showCounts();
}

async function load() {
  for (let i = 0; i < 3; i++) { // again where parts arrived meanwhile, which the counts may lack
    state.arrived = false;
    await loadModels();
    for (const { name } of state.models) {
      const { verdicts } = await ask(`api/verdicts?${new URLSearchParams({ model: name, limit: RECENT })}`);
      const last = verdicts.length ? verdicts[0].id : 0;
      const later = (state.recent[name] || []).filter((part) => part.id > last);
      state.recent[name] = [...verdicts.reverse(), ...later].slice(-RECENT);
    }
    if (!state.arrived) return;
  }
}

let redraw = null;
function arrived(part) {
  const model = state.models.find((one) => one.name === part.model), list = (state.recent[part.model] ||= []);
  state.arrived = true;
  list.push(part);
  if (list.length > RECENT) list.shift();
  if (model) {
    model.parts += 1;
    if (part.is_anomalous) { model.anomalous += 1; model.open += 1; }
  }
  redraw ??= setTimeout(() => {
    redraw = null;
    showCounts();
    if (route()[0] === "live") showLive();
    const fresh = document.getElementById("fresh");
    if (fresh) fresh.hidden = false;
  }, REDRAW);
}

function listen() {
  const link = document.getElementById("link"), source = new EventSource("api/events");
  const says = (text, kind) => { link.textContent = text; link.className = `link ${kind}`; };
  source.onopen = async () => {
    says("live", "on");
    try { await load(); } catch (error) { failed(error); }
    if (route()[0] === "live") show();
  };
  source.onerror = () => says("no connection", "off");
  const on = (name, act) => source.addEventListener(name, (event) => act(JSON.parse(event.data)));
  on("verdict", arrived);
  on("review", async ({ id, review }) => {
    for (const list of Object.values(state.recent)) for (const part of list) if (part.id === id) part.review = review;
    await loadModels().catch(failed);
  });
  on("threshold", async () => {
    await loadModels().catch(failed);
    if (["live", "threshold", "drift"].includes(route()[0])) show();
  });
}

function showLogin() {
  if (document.getElementById("login")) return;
  const key = make("input", { type: "password", autocomplete: "current-password", id: "key", required: true });
  view.replaceChildren(make("form", { id: "login", className: "card login", onsubmit: async (event) => {
    event.preventDefault();
    const answer = await fetch("api/session", { method: "POST", headers: { "X-API-Key": key.value } });
    if (answer.ok) location.reload();
    else notice((await answer.json()).error);
  } }, make("h1", {}, "API key"), make("label", { htmlFor: "key", className: "soft" }, "This service is locked. Its key was set where it was started."),
    key, make("button", { className: "main" }, "Open")));
  key.focus();
}

function themed() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const kept = localStorage.getItem("theme");
  if (kept) root.dataset.theme = kept;
  const label = () => (button.textContent = dark() ? "Light" : "Dark");
  button.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; localStorage.setItem("theme", root.dataset.theme); label(); };
  label();
}

addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  const kind = event.target.tagName === "SELECT" ? "select" : event.target.type;
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (["select", "number", "date", "password"].includes(kind)) return;
  if (kind === "range" && event.key.startsWith("Arrow")) return; // they move it
  const act = state.keys?.[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); act(); }
});
document.getElementById("model").addEventListener("change", () => { state.queue = []; showCounts(); show(); });
themed();
load().then(() => { show(); listen(); }, failed);
