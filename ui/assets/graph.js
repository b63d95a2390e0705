const svg = element.querySelector("svg"), told = element.querySelector(".told");
const SPACE = "http://www.w3.org/2000/svg";
let data = null, chosen = null;

function add(name, attributes, text) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  svg.appendChild(made);
  return made;
}

function draw() {
  svg.replaceChildren();
  if (!data) { svg.setAttribute("height", 0); told.textContent = ""; return; }
  const room = Math.max(280, svg.parentElement.clientWidth - 4), step = Math.max(34, Math.min(90, room / data.experts));
  const radius = Math.min(15, step / 2 - 3), width = step * data.experts;
  const longest = Math.max(1, ...data.edges.map(([p, q]) => q - p));
  const rise = Math.min(220, 26 * longest), base = rise + radius + 6;
  svg.setAttribute("width", width); svg.setAttribute("height", base + radius + 8);
  const at = (expert) => step * (expert + 0.5), most = Math.max(1, ...data.edges.map((edge) => edge[2]));
  for (const [p, q, used] of data.edges) {
    const touched = chosen === p || chosen === q;
    const state = chosen === null ? "" : touched ? " chosen" : " faded";
    const height = rise * (q - p) / longest, middle = (at(p) + at(q)) / 2;
    const line = add("path", { class: `edge${state}`, "stroke-width": data.known ? 1 + 6 * used / most : 1.5,
      d: `M ${at(p)} ${base - radius} Q ${middle} ${base - radius - 2 * height} ${at(q)} ${base - radius}` });
    const title = document.createElementNS(SPACE, "title");
    title.textContent = edgeText(p, q, used); line.appendChild(title);
  }
  const roots = new Set(data.roots);
  for (let expert = 0; expert < data.experts; expert++) {
    const node = add("circle", { class: `node${roots.has(expert) ? " root" : ""}${chosen === expert ? " chosen" : ""}`,
      cx: at(expert), cy: base, r: radius });
    node.addEventListener("click", () => choose(expert));
    add("text", { x: at(expert), y: base, "pointer-events": "none" }, expert);
  }
  element.dataset.edges = data.edges.length;
  tell(roots);
}

const edgeText = (p, q, used) => `${p} → ${q}${data.known ? `: ${used} tokens` : ""}`;

function tell(roots) {
  if (chosen === null) {
    told.textContent = `${data.experts} experts, ${data.edges.length} edges; filled: may be entered from the router`
      + (data.known ? "; width: tokens that traveled along the edge. Choose an expert." : ".");
    return;
  }
  const edges = data.edges.filter(([p, q]) => p === chosen || q === chosen).map((edge) => edgeText(...edge));
  const entries = data.known ? `, entered by ${data.entries[chosen]} tokens` : "";
  told.textContent = `expert ${chosen}: ${roots.has(chosen) ? "root" : "reached along edges only"}${entries}; ${edges.join(", ") || "no edge"}`;
}

function choose(expert) {
  chosen = chosen === expert ? null : Math.max(0, Math.min(data.experts - 1, expert));
  draw();
}

svg.addEventListener("keydown", (event) => {
  if (!data) return;
  if (event.key === "Escape") { chosen = null; draw(); }
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!move) return;
  event.preventDefault();
  const next = chosen === null ? 0 : Math.max(0, Math.min(data.experts - 1, chosen + move));
  chosen = next; draw();
});

function update() {
  data = typeof props.value === "string" && props.value ? JSON.parse(props.value) : null;
  if (data && chosen !== null && chosen >= data.experts) chosen = null;
  draw();
}
new ResizeObserver(() => { if (data) draw(); }).observe(svg.parentElement);
watch("value", update);
update();
