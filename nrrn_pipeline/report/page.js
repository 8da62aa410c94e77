
"use strict";

/* The table: a click on a column's name puts its best value first, another turns the order; what is missing stays last. */
for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => sortBy(button.closest("th")));

function sortBy(head) {
  const first = head.dataset.first || "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  for (const each of head.parentNode.cells) each.setAttribute("aria-sort", each === head ? order : "none");
  const body = head.closest("table").tBodies[0];
  const sign = order === "ascending" ? 1 : -1;
  body.append(...[...body.rows].sort((a, b) => compare(a.cells[head.cellIndex], b.cells[head.cellIndex], sign)));
}

function compare(a, b, sign) {
  const [x, y] = [a.dataset.value, b.dataset.value];
  if (x === undefined) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
  if (x === "" || y === "") return (x === "") - (y === "");
  return Number(x) === Number(y) ? 0 : sign * (Number(x) < Number(y) ? -1 : 1);
}

/* Side by side: two images of one size in one frame, of which the divider shows one on either side. */
const ENLARGED = 6; // CSS pixels a voxel in the details
const LARGEST_FRAME = 0.8; // of the window's height
const byId = (id) => document.getElementById(id);
let gallery, width, height; // the chosen view's images, and their size
const view = byId("view"), detail = document.querySelector(".detail"), divider = byId("divider"), lens = byId("lens"), zoom = byId("zoom"), which = byId("which");
const sides = ["left", "right"];
const seen = { split: 0.5 };

const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));
const scale = () => Number(zoom.value) / window.devicePixelRatio; // CSS pixels a voxel
const wholePixel = (value) => Math.round(value * window.devicePixelRatio) / window.devicePixelRatio;
const narrow = window.matchMedia("(max-width: 760px)"); // the details are below the frame, not beside it
const room = () => view.parentNode.clientWidth - (narrow.matches ? 0 : 260);
const frame = () => ({
  width: Math.min(width * scale(), room()),
  height: Math.min(height * scale(), LARGEST_FRAME * window.innerHeight),
});
const isLarger = () => width * scale() > frame().width + 0.5 || height * scale() > frame().height + 0.5;

function show() {
  const { width: wide, height: high } = frame();
  const half = { x: wide / scale() / 2, y: high / scale() / 2 };
  seen.x = clamp(seen.x, half.x, width - half.x);
  seen.y = clamp(seen.y, half.y, height - half.y);
  seen.split = clamp(seen.split, 0, 1);
  view.style.width = wide + "px";
  view.style.height = high + "px";
  view.style.setProperty("--split", 100 * seen.split + "%");
  view.classList.toggle("larger", isLarger());
  view.classList.toggle("reduced", Number(zoom.value) < 1);
  const [left, top] = [wholePixel(wide / 2 - seen.x * scale()), wholePixel(high / 2 - seen.y * scale())];
  for (const image of view.querySelectorAll("img")) place(image, left, top, scale());
  divider.setAttribute("aria-valuenow", Math.round(100 * seen.split));
  divider.setAttribute("aria-valuetext", Math.round(100 * seen.split) + " % " + nameOf("left") + ", the rest " + nameOf("right"));
  showDetails(left, top);
}

function showDetails(left, top) {
  const across = detail.clientWidth / ENLARGED;
  const x = clamp(Math.round(seen.lensX - across / 2), 0, width - across);
  const y = clamp(Math.round(seen.lensY - across / 2), 0, height - across);
  for (const image of document.querySelectorAll(".detail img")) place(image, -x * ENLARGED, -y * ENLARGED, ENLARGED);
  lens.style.width = lens.style.height = across * scale() + "px";
  lens.style.transform = "translate(" + (left + x * scale()) + "px, " + (top + y * scale()) + "px)";
}

function place(image, left, top, enlarged) {
  image.style.width = width * enlarged + "px";
  image.style.height = height * enlarged + "px";
  image.style.transform = "translate(" + left + "px, " + top + "px)";
}

const nameOf = (side) => byId(side).selectedOptions[0].textContent;

function choose() {
  for (const side of sides)
    for (const part of document.querySelectorAll("[data-side=" + side + "]")) {
      const chosen = gallery[Number(byId(side).value)];
      part.querySelector("img").src = chosen.src;
      part.querySelector("img").alt = chosen.alt;
      part.querySelector(".name").textContent = nameOf(side);
    }
  show();
}

function chooseView() {
  for (const figure of document.querySelectorAll("#gallery figure")) figure.hidden = figure.dataset.view !== which.value;
  gallery = [...document.querySelectorAll("#gallery figure:not([hidden]) img")];
  const before = [width, height];
  [width, height] = ["width", "height"].map((side) => Number(gallery[0].getAttribute(side)));
  if (width !== before[0] || height !== before[1]) fit(); // of views of one size the same place is seen
  choose();
}

function fit() {
  Object.assign(seen, { x: width / 2, y: height / 2, lensX: width / 2, lensY: height / 4 });
  zoom.value = "1";
  for (const { value } of zoom.options) { // the largest that fits, and 1:1 if even that does not
    const enlarged = Number(value) / window.devicePixelRatio;
    const fits = width * enlarged <= room() && height * enlarged <= LARGEST_FRAME * window.innerHeight;
    if (Number(value) > 1 && fits) zoom.value = value;
  }
}

which.addEventListener("change", chooseView);
for (const side of sides) byId(side).addEventListener("change", choose);
byId("swap").addEventListener("click", () => {
  [byId("left").value, byId("right").value] = [byId("right").value, byId("left").value];
  choose();
});
zoom.addEventListener("change", show);
window.addEventListener("resize", show);

/* Pointers: the divider is dragged by itself, or from anywhere while both images fit; else the images are dragged. */
let drag = null;

view.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  const pans = event.target !== divider && isLarger();
  drag = { pans, fromX: event.clientX, fromY: event.clientY, x: seen.x, y: seen.y };
  view.setPointerCapture(event.pointerId);
  (pans ? view : divider).focus({ preventScroll: true, focusVisible: false });
  event.preventDefault();
  follow(event);
});
view.addEventListener("pointermove", follow);
for (const end of ["pointerup", "pointercancel"]) view.addEventListener(end, () => { drag = null; });

function follow(event) {
  const box = view.getBoundingClientRect();
  if (drag && drag.pans) {
    seen.x = drag.x - (event.clientX - drag.fromX) / scale();
    seen.y = drag.y - (event.clientY - drag.fromY) / scale();
  } else if (drag) seen.split = (event.clientX - box.left) / box.width;
  seen.lensX = seen.x + (event.clientX - box.left - box.width / 2) / scale();
  seen.lensY = seen.y + (event.clientY - box.top - box.height / 2) / scale();
  show();
}

/* Keys, on the divider and on the images. */
divider.addEventListener("keydown", (event) => {
  const step = event.shiftKey ? 0.1 : 0.01;
  const to = {
    ArrowLeft: seen.split - step, ArrowDown: seen.split - step, PageDown: seen.split - 0.1, Home: 0,
    ArrowRight: seen.split + step, ArrowUp: seen.split + step, PageUp: seen.split + 0.1, End: 1,
  }[event.key];
  if (to === undefined) return;
  seen.split = to;
  event.preventDefault();
  event.stopPropagation();
  show();
});
view.addEventListener("keydown", (event) => {
  const step = 40 / scale();
  const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  const nearer = { "+": 1, "=": 1, "-": -1 }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey || (!nearer && !(move && isLarger()))) return;
  if (nearer) zoom.selectedIndex = clamp(zoom.selectedIndex + nearer, 0, zoom.options.length - 1);
  else [seen.x, seen.y] = [seen.x + move[0], seen.y + move[1]];
  if (move) [seen.lensX, seen.lensY] = [seen.x, seen.y];
  event.preventDefault();
  show();
});

byId("compare").hidden = false;
chooseView();
