"use strict";
// The page holds everything: the volumes, and the viewer's code compressed. Nothing is fetched.
const bytesOf = (base64) => Uint8Array.from(atob(base64.trim()), (c) => c.charCodeAt(0));
const byId = (id) => document.getElementById(id);

async function unpack(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function choice(parent, name, value, text, checked, onChange) {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "radio", name, value, checked });
  input.addEventListener("change", onChange);
  label.append(input, " " + text);
  parent.append(label);
}

async function start() {
  const data = JSON.parse(byId("data").textContent);
  const code = document.createElement("script");
  code.textContent = await unpack(byId("niivue").textContent);
  document.head.append(code);
  const inWorld = (at) => [0, 1, 2].map((row) =>
    [0, 1, 2].reduce((sum, column) => sum + data.world[4 * row + column] * at[column], data.world[4 * row + 3]));
  const { Niivue, NVImage, SLICE_TYPE, SHOW_RENDER } = window.niivue;

  const nv = new Niivue({
    backColor: [0, 0, 0, 1], crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 0.4, show3Dcrosshair: true, isColorbar: false,
    fontColor: [1, 1, 1, 1],
    dragAndDropEnabled: false, loadingText: "", logLevel: "error", multiplanarShowRender: SHOW_RENDER.ALWAYS,
    isRadiologicalConvention: data.anatomical && data.radiological, isOrientationTextVisible: data.anatomical,
    onLocationChange: (location) => {
      const [scan, ...parts] = location.values;
      const shown = parts[data.levels.findIndex((x) => x.key === level)];
      const where = location.mm.slice ? inWorld(location.mm).map((x) => x.toFixed(1)).join(", ") : "";
      byId("place").textContent =
        `at ${where} ${data.unit}: intensity ${scan.value.toPrecision(4)}` + (shown ? `, part ${Math.round(shown.value)}` : "");
    },
  });
  let level = data.levels[data.levels.length > 1 ? 1 : 0].key;
  await nv.attachToCanvas(byId("view"));

  const image = (item, options) => NVImage.loadFromBase64({ base64: item.nifti, name: item.name, ...options });
  nv.addVolume(await image(data.scan, { colormap: "gray", cal_min: data.scan.low, cal_max: data.scan.high }));
  const overlays = new Map();
  for (const item of data.levels) {
    const overlay = await image(item, { opacity: 0 });
    nv.addVolume(overlay);
    overlays.set(item.key, overlay);
  }

  const boxes = () => [...document.querySelectorAll("input[data-part]")];
  const draw = () => {
    for (const item of data.levels) {
      const overlay = overlays.get(item.key);
      const visible = new Set(boxes().filter((b) => b.dataset.level === item.key && b.checked).map((b) => +b.dataset.part));
      const channel = (i) => item.colours.map((c) => c[i]);
      overlay.setColormapLabel({
        R: channel(0), G: channel(1), B: channel(2),
        A: item.colours.map((_, k) => (visible.has(k) ? 255 : 0)),
        I: item.colours.map((_, k) => k), labels: item.colours.map((_, k) => `part ${k}`),
      });
      overlay.opacity = item.key === level ? +byId("opacity").value : 0;
      const table = document.querySelector(`[data-table="${CSS.escape(item.key)}"]`);
      if (table) table.hidden = item.key !== level;
    }
    nv.updateGLVolume();
  };

  const show = (type) => () => nv.setSliceType(type);
  choice(byId("views"), "view", "all", "three planes and 3D", true, show(SLICE_TYPE.MULTIPLANAR));
  choice(byId("views"), "view", "axial", data.planes[2], false, show(SLICE_TYPE.AXIAL));
  choice(byId("views"), "view", "coronal", data.planes[1], false, show(SLICE_TYPE.CORONAL));
  choice(byId("views"), "view", "sagittal", data.planes[0], false, show(SLICE_TYPE.SAGITTAL));
  choice(byId("views"), "view", "render", "3D", false, show(SLICE_TYPE.RENDER));
  byId("opacity").addEventListener("input", draw);
  const side = () => {
    const radiological = byId("radiological").checked;
    nv.setRadiologicalConvention(radiological);
    byId("convention").textContent =
      `R, A, S: the patient's right, front, top; the patient's right is on the ${radiological ? "left" : "right"}.`;
  };
  byId("sides").hidden = !data.anatomical;
  if (data.anatomical) {
    byId("radiological").checked = data.radiological;
    byId("radiological").addEventListener("change", side);
    side();
  }
  // the background is the one part that is not drawn
  const ground = byId("background");
  const offer = () => {
    const item = data.levels.find((x) => x.key === level);
    ground.replaceChildren(new Option("none", ""), ...item.colours.map((_, k) => new Option(`part ${k}`, k)));
    const hidden = boxes().filter((b) => b.dataset.level === level && !b.checked);
    ground.value = hidden.length === 1 ? hidden[0].dataset.part : "";
  };
  ground.addEventListener("change", () => {
    for (const box of boxes()) if (box.dataset.level === level) box.checked = box.dataset.part !== ground.value;
    draw();
  });
  boxes().forEach((box) => box.addEventListener("change", draw));
  nv.setSliceType(SLICE_TYPE.MULTIPLANAR);
  nv.setClipPlane([2, 0, 0]);
  if (data.levels.length > 1)
    for (const item of data.levels)
      choice(byId("levels"), "level", item.key, item.title, item.key === level, () => { level = item.key; offer(); draw(); });
  offer();
  draw();
  byId("message").remove();
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  byId("message").textContent =
    `The viewer cannot run in this browser (${error.message || error}); it needs WebGL 2. The tables below are complete.`;
  console.error(error);
});
