const canvas = element.querySelector("canvas");
const legend = element.querySelector(".legend");
const output = element.querySelector(".cell");
const scroll = element.querySelector(".scroll");
let data = null, cell = null, width = 8, height = 8, left = 0, drawn = 0;
const TOP = 18;

const dark = () => document.body.classList.contains("dark");
const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
const css = (rgb) => `rgb(${rgb.join(",")})`;

function palette() {
  const ends = data.diverging
    ? [[190, 85, 20], dark() ? [38, 40, 50] : [244, 244, 246], [35, 105, 190]]
    : dark() ? [[34, 38, 54], [52, 96, 168], [178, 218, 255]] : [[233, 238, 248], [110, 160, 220], [12, 44, 110]];
  return Array.from({ length: 256 }, (_, i) =>
    css(i < 128 ? mix(ends[0], ends[1], i / 127) : mix(ends[1], ends[2], (i - 128) / 127)));
}
const REMOVED = () => (dark() ? "rgb(255,140,60)" : "rgb(214,84,0)");
const EXEMPT = () => (dark() ? "rgb(120,230,160)" : "rgb(0,120,60)");

function measure(g) {
  g.font = "11px system-ui, sans-serif";
  left = Math.ceil(Math.max(...["layer  ", ...data.rows].map((row) => g.measureText(row).width))) + 8;
  const room = Math.max(scroll.clientWidth - left - 2, 60);
  width = Math.max(6, Math.min(34, Math.floor(room / data.columns)));
  height = Math.max(8, Math.min(24, width));
}

function draw() {
  if (!data || !scroll.clientWidth) return;
  const g = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
  measure(g);
  const w = left + width * data.columns + 1, h = TOP + height * data.rows.length + 1;
  canvas.width = w * ratio; canvas.height = h * ratio;
  canvas.style.width = `${w}px`; canvas.style.height = `${h}px`;
  g.scale(ratio, ratio);
  const colors = palette(), text = getComputedStyle(document.body).color;
  const removed = REMOVED(), exempt = EXEMPT(), gap = width > 7 ? 1 : 0.5;
  for (let row = 0; row < data.rows.length; row++)
    for (let column = 0; column < data.columns; column++) {
      const at = row * data.columns + column, mark = data.marks[at];
      if (mark === " ") continue;
      const x = left + column * width, y = TOP + row * height;
      const gone = mark === "p" || mark === "m";
      g.fillStyle = gone ? removed : colors[data.bytes[at]];
      g.fillRect(x, y, width - gap, height - gap);
      if (gone || mark === "x" || mark === "s") sign(g, mark, x, y, exempt);
    }
  labels(g, text);
  if (cell) outline(g, text);
  drawn += 1;
  element.dataset.drawn = drawn;
  element.dataset.marks = data.marks;
}

function sign(g, mark, x, y, exempt) {
  const w = width - 1, h = height - 1, gone = mark === "p" || mark === "m";
  g.strokeStyle = gone ? (dark() ? "rgb(60,25,0)" : "white") : exempt;
  g.lineWidth = gone ? 1 : 2;
  g.beginPath();
  if (!gone) g.rect(x + 1, y + 1, w - 2, h - 2);
  else if (mark === "p") { g.moveTo(x + 2, y + 2); g.lineTo(x + w - 2, y + h - 2); g.moveTo(x + w - 2, y + 2); g.lineTo(x + 2, y + h - 2); }
  else { g.moveTo(x + 2, y + h / 2); g.lineTo(x + w - 2, y + h / 2); g.moveTo(x + w / 2, y + 2); g.lineTo(x + w / 2, y + h - 2); }
  g.stroke();
}

function labels(g, text) {
  g.fillStyle = text; g.font = "11px system-ui, sans-serif"; g.textBaseline = "middle"; g.textAlign = "right";
  const every = Math.ceil(11 / height), step = [1, 2, 4, 8, 16, 32].find((n) => n * width >= 24) || 64;
  data.rows.forEach((row, i) => { if (i % every === 0) g.fillText(row, left - 5, TOP + i * height + height / 2); });
  g.textAlign = "left"; g.fillText("layer", 0, TOP / 2);
  g.textAlign = "center";
  for (let i = 0; i < data.columns; i += step) g.fillText(String(i), left + i * width + width / 2, TOP / 2);
}

function outline(g, text) {
  g.strokeStyle = text; g.lineWidth = 2;
  g.strokeRect(left + cell[1] * width - 0.5, TOP + cell[0] * height - 0.5, width, height);
}

function keys() {
  const found = new Set(data.marks), colors = palette();
  const scale = `linear-gradient(90deg, ${[0, 64, 128, 192, 255].map((i) => colors[i]).join(",")})`;
  const items = [`<span>columns: experts</span><span>low <i class="scale" style="background:${scale}"></i> high</span>`];
  for (const [mark, color] of [["p", REMOVED()], ["m", REMOVED()]])
    if (found.has(mark)) items.push(`<span><i class="swatch" style="background:${color}"></i>${data.names[mark]}</span>`);
  for (const mark of ["x", "s"])
    if (found.has(mark)) items.push(`<span><i class="swatch" style="border:2px solid ${EXEMPT()}"></i>${data.names[mark]}</span>`);
  legend.innerHTML = items.join(""); legend.hidden = false;
}

function tell() {
  if (!cell) { output.textContent = ""; return; }
  const at = cell[0] * data.columns + cell[1], mark = data.marks[at];
  const figures = Object.entries(data.fields)
    .filter(([, values]) => values[at] !== null).map(([name, values]) => `${name} ${values[at]}`);
  output.textContent = [`layer ${data.rows[cell[0]]}, expert ${cell[1]}`, ...figures, data.names[mark]].join(" · ");
}

function focusCell(row, column) {
  cell = [Math.max(0, Math.min(data.rows.length - 1, row)), Math.max(0, Math.min(data.columns - 1, column))];
  draw(); tell();
}

function update() {
  const text = typeof props.value === "string" ? props.value : "";
  data = text ? JSON.parse(text) : null;
  legend.hidden = !data;
  canvas.style.display = data ? "block" : "none";
  if (!data) { cell = null; output.textContent = ""; return; }
  data.bytes = Uint8Array.from(atob(data.shade), (c) => c.charCodeAt(0));
  if (cell && (cell[0] >= data.rows.length || cell[1] >= data.columns)) cell = null;
  draw(); keys(); tell();
}

canvas.addEventListener("pointermove", (event) => {
  if (!data) return;
  const column = Math.floor((event.offsetX - left) / width), row = Math.floor((event.offsetY - TOP) / height);
  if (row >= 0 && column >= 0 && row < data.rows.length && column < data.columns) focusCell(row, column);
});
canvas.addEventListener("focus", () => { if (data && !cell) focusCell(0, 0); });
canvas.addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!data || !moves[event.key]) return;
  event.preventDefault();
  const [row, column] = cell || [0, 0];
  focusCell(row + moves[event.key][0], column + moves[event.key][1]);
});
new ResizeObserver(draw).observe(scroll);
new MutationObserver(() => { if (data) { draw(); keys(); } }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
watch("value", update);
update();
