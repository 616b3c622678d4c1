
"use strict";
// Text from rows only becomes text nodes; no markup is built from strings.
const { name, about, packs } = JSON.parse(document.getElementById("packs").textContent);
const number = (n) => n.toLocaleString("en-US");
const counted = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
const share = (part, whole) => `${(100 * part / (whole || 1)).toFixed(1)}\u00a0%`;
const color = (segment) => `c${segment % 6}`;

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function drawing(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function rectangle(x, y, width, height, className) {
  return drawing("rect", { x, y, width, height, class: className });
}

function titled(shape, title) {
  shape.append(drawing("title", {}, title));
  return shape;
}

const rowOf = (segment) => `row ${segment.row} of ${segment.source}`;
const spansOf = (pack) => pack.segments.flatMap((segment) => segment.spans);

// The pack as a strip: segments, and below them images and supervised tokens.
function strip(pack) {
  const lane = (className, label, shapes) => [element("span", "", label), drawing("svg", {
    viewBox: `0 0 ${pack.capacity} 1`, preserveAspectRatio: "none", class: className, role: "img",
    "aria-label": label }, ...shapes)];
  const segments = pack.segments.map((segment, n) => {
    const shape = rectangle(segment.begin, 0, segment.end - segment.begin, 1, `of-segment ${color(n)}`);
    shape.addEventListener("click", () => goTo(n));
    return titled(shape, `segment ${n}: ${rowOf(segment)}, ${counted(segment.end - segment.begin, "token")}`);
  });
  const images = spansOf(pack).filter((span) => span.medium !== undefined).map((span) => {
    const { segment, name } = pack.media[span.medium];
    const shape = rectangle(span.begin, 0, span.end - span.begin, 1, `of-segment ${color(segment)}`);
    return titled(shape, `${name} of segment ${segment}`);
  });
  const supervised = spansOf(pack).filter((span) => span.supervised)
    .map((span) => rectangle(span.begin, 0, span.end - span.begin, 1, "is-on"));
  return element("div", "strip",
    ...lane("segments", "segments", segments),
    ...(images.length ? lane("", "images", images) : []),
    ...lane("", "supervised", supervised),
    element("div", "axis", element("span", "", "token 0"), element("span", "", number(pack.capacity))));
}

function square(size, title, shapes, caption) {
  const picture = drawing("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": title }, ...shapes);
  return element("figure", "square", element("h3", "", title), picture, element("figcaption", "", caption));
}

function attention(pack) {
  const shapes = pack.segments.flatMap(({ begin, end, spans }, n) => {
    const points = `${begin},${begin} ${begin},${end} ${end},${end}`;
    const rows = spans.filter((span) => span.supervised).map((span) => drawing("polygon", {
      points: `${begin},${span.begin} ${begin},${span.end} ${span.end},${span.end} ${span.begin},${span.begin}`,
      class: `seen-on ${color(n)}` }));
    return [drawing("polygon", { points, class: `seen ${color(n)}` }), ...rows];
  });
  const pairs = (n) => n * (n + 1) / 2;
  const seen = pack.segments.reduce((sum, { begin, end }) => sum + pairs(end - begin), 0);
  return square(pack.tokens, "Attention of the text", shapes,
    "A row is a token, its columns are the tokens it sees: those before it in its segment. Full colour: supervised. " +
    `${share(seen, pairs(pack.tokens))} of the pairs that one segment of this length would have.`);
}

function tower(pack) {
  let end = 0;
  const shapes = pack.media.flatMap(({ segment, frames, patches }) => Array.from({ length: frames }, () => {
    end += patches;
    return rectangle(end - patches, end - patches, patches, patches, `seen ${color(segment)}`);
  }));
  return square(end, "Attention of the vision tower", shapes,
    `${number(end)} patches: each sees those of its image or frame, at most.`);
}

// A thumbnail of an image or video with its size, or why it cannot be shown.
function medium(pack, span) {
  const { name, video, size, frames, tokens, file, jpeg, width, height, why } = pack.media[span.medium];
  const isPart = span.end - span.begin < tokens;
  if (isPart && span.frame) {
    return element("span", "medium part", `${name}, part ${span.frame + 1} of ${frames}: ` +
      counted(span.end - span.begin, "token"));
  }
  const box = element("span", "medium");
  if (jpeg !== undefined) {
    const image = element("img");
    [image.width, image.height] = [width, height]; // set before decoding, so that the layout does not move
    image.alt = `${name}: ${file}`;
    image.src = `data:image/jpeg;base64,${jpeg}`;
    box.append(image);
    if (video) box.append(element("span", "play", "\u25b6 first frame"));
  } else {
    box.append(element("span", "why", why));
  }
  box.append(element("b", "", name), element("span", "soft", `${size}, ${counted(tokens, "token")}`),
    element("br"), element("span", "soft", file));
  if (isPart) box.append(element("br"), `part 1 of ${frames}: ${counted(span.end - span.begin, "token")}`);
  return box;
}

// Line ends in supervised text are supervised too, so show them.
function marked(text) {
  const parts = text.split("\n").flatMap((line, n) => n ? [element("span", "newline", "\u21b5"), "\n", line] : [line]);
  return element("mark", "", ...parts);
}

function body(pack, segment) {
  return element("div", "text", ...segment.spans.flatMap((span) => {
    if (span.medium !== undefined) return [medium(pack, span)];
    const text = span.supervised ? marked(span.text) : element("span", "off", span.text);
    return span.cut ? [text, element("span", "cut", ` [${counted(span.cut, "character")} did not fit] `)] : [text];
  }));
}

function card(pack, segment, n) {
  const fact = (figure, words) => element("span", "fact", element("b", "", figure), ` ${words}`);
  const tokens = segment.end - segment.begin;
  const media = pack.media.filter((one) => one.segment === n);
  const images = media.filter((one) => !one.video).length, videos = media.length - images;
  const made = element("details", color(n), element("summary", "",
    element("span", "row", `${n}: ${rowOf(segment)}`),
    fact(number(tokens), tokens === 1 ? "token" : "tokens"), fact(share(tokens, pack.tokens), "of the pack"),
    fact(number(segment.supervised), "supervised"),
    ...(images ? [fact(number(images), images === 1 ? "image" : "images")] : []),
    ...(videos ? [fact(number(videos), videos === 1 ? "video" : "videos")] : [])), body(pack, segment));
  made.open = true;
  return made;
}

const main = element("main");
const previous = element("button", "", "\u2039 Previous");
const next = element("button", "", "Next \u203a");
const choice = element("select", "", ...packs.map((pack) => element("option", "", `pack ${pack.number}`)));
const wanted = element("input");
const status = element("p", "status soft");
let shown = 0;
let cards = [];

function show(place) {
  shown = place;
  const pack = packs[place];
  const images = pack.media.filter((one) => !one.video).length, videos = pack.media.length - images;
  const kinds = [...(images || !videos ? [counted(images, "image")] : []), ...(videos ? [counted(videos, "video")] : [])];
  const placeholders = pack.media.reduce((sum, one) => sum + one.tokens, 0);
  const facts = [counted(pack.segments.length, "segment"), `${number(pack.supervised)} supervised`,
    kinds.join(" and ") + (placeholders ? ` in ${counted(placeholders, "token")}` : "")];
  cards = pack.segments.map((segment, n) => card(pack, segment, n));
  const fold = element("button", "", "Fold all");
  fold.addEventListener("click", () => {
    const open = !cards.some((one) => one.open);
    for (const one of cards) one.open = open;
    fold.textContent = open ? "Fold all" : "Unfold all";
  });
  const legend = element("p", "soft", element("mark", "", "supervised"), ": has a loss");
  const list = element("section", "list", element("div", "tools", legend, fold), ...cards);
  const aside = element("aside", "", attention(pack), ...(pack.media.length ? [tower(pack)] : []));
  const problems = about.problems.map((problem) => element("li", "", problem));
  main.replaceChildren(
    ...(problems.length ? [element("ul", "problems", ...problems)] : []),
    ...(onPage ? [element("p", "soft note", onPage)] : []),
    element("h2", "", `Pack ${pack.number}: ${number(pack.tokens)} of ${number(pack.capacity)} tokens`),
    element("p", "soft", `${share(pack.tokens, pack.capacity)} full, ${facts.join(", ")}`),
    strip(pack), element("div", "sides", aside, list));
  choice.selectedIndex = place;
  previous.disabled = place === 0;
  next.disabled = place === packs.length - 1;
}

function turnTo(place) {
  if (place < 0 || place >= packs.length) return;
  show(place);
  status.textContent = "";
  window.scrollTo(0, 0);
}

function goTo(segment) {
  for (const one of cards) one.classList.remove("found");
  cards[segment].open = true;
  cards[segment].classList.add("found");
  cards[segment].scrollIntoView({ block: "start" });
}

// Several files may have the same row number, and a split document has several segments.
let hits = 0;
function find() {
  const [, file, row] = /^(?:(.*):)?\s*([\d,]+)$/.exec(wanted.value.trim()) || [];
  if (row === undefined) {
    status.textContent = "A row is a number, or FILE:NUMBER.";
    return;
  }
  const places = packs.flatMap(({ segments }, place) => segments.flatMap((segment, n) =>
    segment.row === Number(row.replaceAll(",", "")) && (!file || segment.source === file) ? [[place, n]] : []));
  if (!places.length) {
    const elsewhere = packs.length < about.packs ? "; mmpack inspect --row looks in all" : "";
    status.textContent = `Row ${wanted.value.trim()} is in no pack of this page${elsewhere}.`;
    return;
  }
  const [place, segment] = places[hits % places.length];
  if (place !== shown) show(place);
  goTo(segment);
  const more = places.length > 1 ? ` (${hits % places.length + 1} of ${places.length}; Find shows the next)` : "";
  status.textContent = `Segment ${segment} of pack ${packs[place].number}${more}.`;
  hits += 1;
}

const [first, last] = [packs[0], packs[packs.length - 1]].map((pack) => pack.number);
const onPage = packs.length === about.packs ? "" :
  `This page has ${first === last ? `pack ${first}` : `packs ${first} to ${last}`} of ${number(about.packs)}` +
  (about.next === null ? "." : `; mmpack inspect --pack ${about.next} --html FILE has the next.`);
previous.addEventListener("click", () => turnTo(shown - 1));
next.addEventListener("click", () => turnTo(shown + 1));
choice.addEventListener("change", () => turnTo(choice.selectedIndex));
choice.setAttribute("aria-label", "pack");
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowLeft") turnTo(shown - 1);
  if (event.key === "ArrowRight") turnTo(shown + 1);
});
wanted.type = "search";
wanted.placeholder = "row, or file:row";
wanted.setAttribute("aria-label", "row to find: its number, or file:number");
wanted.addEventListener("input", () => { hits = 0; });
const search = element("form", "", wanted, element("button", "", "Find"));
search.addEventListener("submit", (event) => { event.preventDefault(); find(); });
status.setAttribute("role", "status");
const heading = element("h1", "", "mmpack inspect ", element("small", "", name));
const turning = packs.length > 1 ? [element("nav", "", previous, choice, next)] : [];
document.body.append(element("div", "bar", element("header", "", heading, ...turning, search, status)), main);
turnTo(0);
if (about.segment !== null) goTo(about.segment);
