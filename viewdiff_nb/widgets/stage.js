// A picture that can be dragged and asked for its values; see Stage in explorer.py.

const DEGREES_PER_PIXEL = 0.5;
const KEYS = { ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] }; // degrees right, down

function node(tag, className, parent) {
  const element = document.createElement(tag);
  element.className = className;
  parent.appendChild(element);
  return element;
}

function render({ model, el }) {
  el.classList.add("vd-stage");
  const frame = node("div", "vd-frame", el);
  const image = node("img", "vd-picture", frame);
  const tip = node("div", "vd-tip", frame);
  const caption = node("div", "vd-caption", el);
  const gone = node("div", "vd-gone vd-first", el);
  gone.textContent = "The kernel is gone: run this cell again.";
  image.draggable = false;

  // ---- the picture

  let newest = 0;
  let url = null;
  function showPicture() {
    const bytes = model.get("picture");
    if (!bytes || !bytes.byteLength) return;
    const mine = ++newest;
    const next = URL.createObjectURL(new Blob([bytes]));
    const probe = new Image();
    probe.src = next;
    probe.decode().then(
      () => {
        if (mine !== newest) return URL.revokeObjectURL(next);
        image.src = next;
        if (url) URL.revokeObjectURL(url);
        url = next;
        frame.dataset.pictures = mine;
        frame.dispatchEvent(new CustomEvent("vd-shown", { bubbles: true }));
      },
      () => URL.revokeObjectURL(next),
    );
  }

  function describe() {
    const turnable = model.get("turnable");
    image.alt = model.get("label");
    image.style.width = `${model.get("width")}px`;
    caption.textContent = model.get("caption");
    caption.style.maxWidth = image.style.width;
    frame.classList.toggle("vd-turnable", turnable);
    frame.tabIndex = turnable ? 0 : -1;
    frame.setAttribute("role", turnable ? "application" : "presentation");
    frame.setAttribute("aria-label", turnable ? `${model.get("label")}; arrow keys turn it` : "");
  }

  // ---- turning it: sums, at most one message a frame; ipywidgets holds back while the kernel is busy

  let pending = null; // not yet in the sums, which another view of the same stage adds to as well
  function turn(right, down) {
    if (pending) {
      pending = [pending[0] + right, pending[1] + down];
      return;
    }
    pending = [right, down];
    requestAnimationFrame(() => {
      const sums = model.get("turned");
      model.set("turned", [sums[0] + pending[0], sums[1] + pending[1]]);
      pending = null;
      model.save_changes();
    });
  }

  let held = null;
  frame.addEventListener("pointerdown", (event) => {
    if (!model.get("turnable") || event.button !== 0) return;
    held = [event.clientX, event.clientY];
    frame.setPointerCapture(event.pointerId);
    frame.focus();
    event.preventDefault();
  });
  frame.addEventListener("pointermove", (event) => {
    if (held) {
      turn((event.clientX - held[0]) * DEGREES_PER_PIXEL, (event.clientY - held[1]) * DEGREES_PER_PIXEL);
      held = [event.clientX, event.clientY];
    } else {
      showValue(event);
    }
  });
  for (const end of ["pointerup", "pointercancel"]) frame.addEventListener(end, () => (held = null));
  frame.addEventListener("keydown", (event) => {
    if (!model.get("turnable") || !(event.key in KEYS)) return;
    turn(...KEYS[event.key]);
    event.preventDefault();
    event.stopPropagation();
  });

  // ---- values under the pointer

  function showValue(event) {
    const box = image.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width;
    const y = (event.clientY - box.top) / box.height;
    let text = "";
    for (const { box: [left, top, right, bottom], rows, columns, texts } of model.get("grids")) {
      if (x < left || x >= right || y < top || y >= bottom) continue;
      const row = Math.floor(((y - top) / (bottom - top)) * rows);
      const column = Math.floor(((x - left) / (right - left)) * columns);
      text = texts[row * columns + column];
    }
    tip.textContent = text;
    tip.style.display = text ? "block" : "none";
    tip.style.left = `${Math.min(event.clientX - box.left + 12, box.width - 20)}px`;
    tip.style.top = `${event.clientY - box.top + 14}px`;
  }
  frame.addEventListener("pointerleave", () => (tip.style.display = "none"));

  // ---- once it is in the page

  const placed = new MutationObserver(join);
  function join() {
    const explorer = el.closest(".vd-explorer");
    if (!explorer) return;
    gone.classList.toggle("vd-first", explorer.querySelector(".vd-stage") === el); // said once is enough
    // Jupyter would take the arrow keys of the stage, and of the sliders beside it, to move between cells
    explorer.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
    placed.disconnect();
    if (explorer.querySelector(".vd-stage") !== el) return; // the first stage does it for all
    nameSliders();
    named.observe(explorer, { childList: true, subtree: true });
  }

  // ipywidgets writes a slider's name beside it, and does not tell it to screen readers
  const named = new MutationObserver(nameSliders);
  function nameSliders() {
    const explorer = el.closest(".vd-explorer");
    for (const handle of explorer?.querySelectorAll(".noUi-handle:not([aria-label])") ?? []) {
      const slider = handle.closest(".widget-slider");
      const name = slider.querySelector("label")?.textContent ?? "";
      handle.setAttribute("aria-label", name);
      const number = slider.querySelector(".widget-readout");
      number?.setAttribute("role", "textbox");
      number?.setAttribute("aria-label", `${name}, the number`);
    }
    explorer?.querySelector(".vd-readout:not([aria-live])")?.setAttribute("aria-live", "polite");
  }
  placed.observe(document.body, { childList: true, subtree: true });

  model.on("change:picture", showPicture);
  for (const name of ["label", "caption", "turnable", "width"]) model.on(`change:${name}`, describe);
  describe();
  showPicture();
  join();
  return () => {
    placed.disconnect();
    named.disconnect();
    if (url) URL.revokeObjectURL(url);
  };
}

export default { render };
