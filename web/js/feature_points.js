// The picture on UPLiFT Feature Mask, and the points set on it by mouse or keyboard.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const NODE = "UPLiFTFeatureMask";
const REACH = 10; // screen pixels within which a point is taken hold of
const HINT = "Run once to see the picture, then click on what you mean.";
const KEYS = "Click adds a point, right or Shift click an unwanted one, drag moves, double click removes. Keyboard: "
    + "arrows move the cross (with Shift: by one pixel), Enter adds, - adds an unwanted one, Delete removes the nearest.";

class PointsEditor {
    constructor(node, points) {
        this.node = node;
        this.widget = points;
        this.image = null;
        this.size = null; // [width, height] of the picture in pixels, in which points count
        this.cursor = null;
        this.held = -1;
        this.root = document.createElement("div");
        this.root.className = "uplift-points";
        this.root.style.cssText = "position:relative;width:100%;height:100%;min-height:160px;overflow:hidden;"
            + "border-radius:6px;background:var(--comfy-input-bg);color:var(--input-text);outline-offset:-2px;";
        this.canvas = document.createElement("canvas");
        this.canvas.style.cssText = "display:block;width:100%;height:100%;cursor:crosshair;touch-action:none;";
        this.label = document.createElement("div");
        this.label.style.cssText = "position:absolute;inset:0;display:flex;align-items:center;justify-content:center;"
            + "padding:12px;text-align:center;font:13px sans-serif;pointer-events:none;";
        this.label.textContent = HINT;
        this.root.append(this.canvas, this.label);
        this.root.tabIndex = 0;
        this.root.setAttribute("role", "application");
        this.root.setAttribute("aria-label", "Points on the picture. " + KEYS);
        this.root.title = KEYS;
        this.canvas.addEventListener("pointerdown", (event) => this.press(event));
        this.canvas.addEventListener("pointermove", (event) => this.move(event));
        this.canvas.addEventListener("pointerup", (event) => this.release(event));
        this.canvas.addEventListener("pointercancel", () => { this.held = -1; });
        this.canvas.addEventListener("dblclick", (event) => this.remove(event));
        this.canvas.addEventListener("contextmenu", (event) => { event.preventDefault(); event.stopPropagation(); });
        this.root.addEventListener("keydown", (event) => this.key(event));
        this.root.addEventListener("focus", () => this.draw());
        this.root.addEventListener("blur", () => this.draw());
        new ResizeObserver(() => this.draw()).observe(this.root);
    }

    get points() {
        try {
            const points = JSON.parse(this.widget.value || "[]");
            return Array.isArray(points) ? points : [];
        } catch {
            return []; // typed by hand and not finished
        }
    }

    set points(points) {
        this.widget.value = JSON.stringify(points);
        this.widget.callback?.(this.widget.value);
        this.node.graph?.setDirtyCanvas(true, true);
        app.graph?.change?.();
        this.draw();
    }

    /** Shows a picture the node has made. */
    show(picture, size) {
        const query = new URLSearchParams({ filename: picture.filename, type: picture.type,
            subfolder: picture.subfolder ?? "" });
        const image = new Image();
        image.onload = () => {
            this.image = image;
            this.size = size ?? [image.naturalWidth, image.naturalHeight];
            this.label.textContent = "";
            this.draw();
        };
        image.onerror = () => { this.label.textContent = HINT; };
        image.src = api.apiURL(`/view?${query}`);
    }

    /** Where the picture lies on the canvas: left, top and canvas pixels a picture pixel. */
    place() {
        const { width, height } = this.canvas;
        const scale = Math.min(width / this.size[0], height / this.size[1]);
        return [(width - this.size[0] * scale) / 2, (height - this.size[1] * scale) / 2, scale];
    }

    /** A mouse position as picture pixels, or null outside of it. */
    position(event) {
        if (!this.image) return null;
        const box = this.canvas.getBoundingClientRect(); // includes the zoom of the graph
        const [left, top, scale] = this.place();
        const x = ((event.clientX - box.left) * this.canvas.width / box.width - left) / scale;
        const y = ((event.clientY - box.top) * this.canvas.height / box.height - top) / scale;
        if (x < 0 || y < 0 || x >= this.size[0] || y >= this.size[1]) return null;
        return this.pixel(x, y);
    }

    pixel(x, y) {
        const inside = (value, limit) => Math.min(Math.max(Math.floor(value), 0), limit - 1);
        return { x: inside(x, this.size[0]), y: inside(y, this.size[1]) };
    }

    middle() {
        return this.pixel(this.size[0] / 2, this.size[1] / 2);
    }

    nearest(at, reach) {
        let found = -1, best = reach;
        this.points.forEach((point, index) => {
            const distance = Math.hypot(point.x - at.x, point.y - at.y);
            if (distance <= best) [found, best] = [index, distance];
        });
        return found;
    }

    /** REACH in picture pixels at the present zoom. */
    reach() {
        const box = this.canvas.getBoundingClientRect();
        return REACH * this.canvas.width / box.width / this.place()[2];
    }

    press(event) {
        event.stopPropagation();
        const at = this.position(event);
        if (!at || event.button === 1) return;
        event.preventDefault();
        this.root.focus({ preventScroll: true });
        this.held = this.nearest(at, this.reach());
        this.moved = false;
        if (this.held < 0) {
            const unwanted = event.button === 2 || event.shiftKey;
            this.points = [...this.points, { ...at, label: unwanted ? 0 : 1 }];
            this.held = this.points.length - 1;
        }
        this.canvas.setPointerCapture(event.pointerId);
    }

    move(event) {
        if (this.held < 0) return;
        event.stopPropagation();
        const at = this.position(event), points = this.points;
        if (!at || !points[this.held]) return;
        points[this.held] = { ...points[this.held], ...at };
        this.points = points;
    }

    release(event) {
        if (this.held < 0) return;
        event.stopPropagation();
        this.held = -1;
    }

    remove(event) {
        event.preventDefault();
        event.stopPropagation();
        const at = this.position(event);
        if (!at) return;
        const index = this.nearest(at, this.reach());
        if (index >= 0) this.points = this.points.filter((_, i) => i !== index);
    }

    key(event) {
        if (!this.image) return;
        const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(...this.size) / 50));
        const at = this.cursor ?? this.middle();
        const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
        if (moves[event.key]) {
            this.cursor = this.pixel(at.x + moves[event.key][0], at.y + moves[event.key][1]);
        } else if (event.key === "Enter" || event.key === "-") {
            const label = event.key === "-" || event.shiftKey ? 0 : 1;
            this.points = [...this.points, { ...at, label }];
        } else if (event.key === "Delete" || event.key === "Backspace") {
            const index = this.nearest(at, Infinity);
            if (index >= 0) this.points = this.points.filter((_, i) => i !== index);
        } else {
            return; // the page's own keys
        }
        this.cursor ??= at;
        event.preventDefault();
        event.stopPropagation();
        this.draw();
    }

    draw() {
        const density = window.devicePixelRatio || 1;
        const width = Math.round(this.root.clientWidth * density), height = Math.round(this.root.clientHeight * density);
        if (!width || !height) return;
        if (this.canvas.width !== width || this.canvas.height !== height) {
            this.canvas.width = width;
            this.canvas.height = height;
        }
        const context = this.canvas.getContext("2d");
        context.clearRect(0, 0, width, height);
        if (!this.image) return;
        const [left, top, scale] = this.place();
        context.drawImage(this.image, left, top, this.size[0] * scale, this.size[1] * scale);
        const spot = (point) => [left + (point.x + 0.5) * scale, top + (point.y + 0.5) * scale];
        for (const point of this.points) {
            const [x, y] = spot(point), wanted = point.label !== 0, r = 7 * density;
            context.beginPath();
            context.arc(x, y, r, 0, 2 * Math.PI);
            context.fillStyle = wanted ? "#2fbf71" : "#e5484d";
            context.fill();
            context.lineWidth = 2 * density;
            context.strokeStyle = "#ffffff";
            context.stroke();
            context.beginPath(); // a plus or a minus, for those who cannot tell the colours apart
            context.moveTo(x - r / 2, y);
            context.lineTo(x + r / 2, y);
            if (wanted) {
                context.moveTo(x, y - r / 2);
                context.lineTo(x, y + r / 2);
            }
            context.stroke();
        }
        const focused = document.activeElement === this.root;
        if (focused && (this.cursor || this.root.matches(":focus-visible"))) { // the latter: reached by Tab
            const [x, y] = spot(this.cursor ?? this.middle()), r = 10 * density;
            for (const [color, line] of [["#000000", 3], ["#ffffff", 1]]) {
                context.beginPath();
                context.moveTo(x - r, y);
                context.lineTo(x + r, y);
                context.moveTo(x, y - r);
                context.lineTo(x, y + r);
                context.strokeStyle = color;
                context.lineWidth = line * density;
                context.stroke();
            }
        }
    }
}

app.registerExtension({
    name: "uplift.featurePoints",

    nodeCreated(node) {
        if (node.comfyClass !== NODE) return;
        const points = node.widgets?.find((widget) => widget.name === "points");
        if (!points) return;
        const editor = new PointsEditor(node, points);
        points.hidden = true; // its text is written by the picture; it stays the value that is saved
        points.options ??= {};
        points.options.hidden = true;
        points.computeSize = () => [0, -4];
        const picture = node.addDOMWidget("picture", "uplift_points", editor.root, {
            serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight: () => 200,
        });
        // The panel of the selected node's inputs writes its own width here, and the picture would shrink to it.
        Object.defineProperty(picture, "width", { get: () => undefined, set: () => {}, configurable: true });
        node.upliftPoints = editor;
        const executed = node.onExecuted;
        node.onExecuted = function (output) {
            executed?.call(this, output);
            const picture = output?.uplift_picture?.[0];
            if (picture) editor.show(picture, output.uplift_size?.[0]);
        };
        const configured = node.onConfigure;
        node.onConfigure = function (saved) {
            configured?.call(this, saved);
            editor.draw();
        };
        if (node.size[0] < 320 || node.size[1] < 420) {
            node.setSize([Math.max(node.size[0], 320), Math.max(node.size[1], 420)]);
        }
    },
});
