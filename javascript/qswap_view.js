/**
 * Draws a snapshot into a mount element.
 *
 * Elements are made once per layout of the models; after that an update changes only attributes and the data of text nodes. That
 * is cheap for thousands of layers, and it is no `childList` mutation: Forge and its extensions run callbacks over the whole
 * page at each of those. All text comes in through text nodes, never as markup: names of layers are read from strangers' files.
 */
(function () {
    "use strict";

    const qswap = (window.qswap = window.qswap || {});

    const MESSAGES_SHOWN = 4;
    const SHORT_SECTION_PX = 240;
    const DIGIT_PX = 8;
    const SVG_NS = "http://www.w3.org/2000/svg";

    function element(tag, className, ...children) {
        const made = document.createElement(tag);
        made.className = className;
        made.append(...children);
        return made;
    }

    /** An element with one text node, and the function that changes it. */
    function label(tag, className, text = "") {
        const node = document.createTextNode(text);
        const made = element(tag, className, node);
        made.setText = (next) => {
            if (node.data !== next) {
                node.data = next;
            }
        };
        return made;
    }

    function setAttribute(target, name, value) {
        if (target.getAttribute(name) !== value) {
            target.setAttribute(name, value);
        }
    }

    function show(target, visible) {
        if (target.hidden === visible) {
            target.hidden = !visible;
        }
    }

    function caret() {
        const svg = document.createElementNS(SVG_NS, "svg");
        svg.setAttribute("class", "qswap-caret");
        svg.setAttribute("viewBox", "0 0 10 10");
        svg.setAttribute("aria-hidden", "true");
        const path = document.createElementNS(SVG_NS, "path");
        path.setAttribute("d", "M3 1.5 L7 5 L3 8.5");
        svg.append(path);
        return svg;
    }

    /** The bar of the device's memory with its key. */
    class MemoryBar {
        constructor() {
            this.title = label("span", "qswap-memory-title");
            this.total = label("span", "qswap-muted");
            this.bar = element("div", "qswap-bar");
            this.bar.setAttribute("role", "img");
            this.key = element("div", "qswap-key");
            this.parts = new Map();
            this.root = element(
                "section",
                "qswap-memory",
                element("div", "qswap-memory-head", this.title, this.total),
                this.bar,
                this.key,
            );
        }

        update(snapshot) {
            const memory = qswap.words.deviceMemory(snapshot);
            show(this.root, memory !== null);
            if (memory === null) {
                return;
            }
            this.title.setText(`Memory of ${snapshot.device || "the device"}`);
            this.total.setText(qswap.words.bytes(memory.total));
            const said = [];
            for (const part of memory.parts) {
                if (!this.parts.has(part.id)) {
                    this.addPart(part);
                }
                const { segment, entry, size } = this.parts.get(part.id);
                segment.style.flexGrow = String(part.bytes / memory.total);
                show(segment, part.bytes > 0);
                show(entry, part.bytes > 0);
                size.setText(qswap.words.bytes(part.bytes));
                if (part.bytes > 0) {
                    said.push(`${part.label} ${qswap.words.bytes(part.bytes)}`);
                }
            }
            setAttribute(this.bar, "aria-label", `${qswap.words.bytes(memory.total)}: ${said.join(", ")}`);
        }

        addPart(part) {
            const size = label("span", "qswap-number");
            const swatch = element("i", `qswap-swatch qswap-part-${part.id}`);
            const entry = element("span", "qswap-key-entry", swatch, label("span", "qswap-muted", part.label), size);
            const segment = element("div", `qswap-segment qswap-part-${part.id}`);
            this.bar.append(segment);
            this.key.append(entry);
            this.parts.set(part.id, { segment, entry, size });
        }
    }

    /** The numbers of one model. */
    class Figures {
        constructor() {
            this.root = element("div", "qswap-figures");
            this.tiles = new Map();
        }

        update(model, device) {
            for (const figure of qswap.words.figures(model, device)) {
                if (!this.tiles.has(figure.id)) {
                    this.addTile(figure.id);
                }
                const tile = this.tiles.get(figure.id);
                tile.name.setText(figure.label);
                tile.value.setText(figure.value);
                tile.detail.setText(figure.detail);
                tile.root.classList.toggle("qswap-bad", Boolean(figure.bad));
                tile.meter.classList.toggle("qswap-unmetered", typeof figure.share !== "number");
                tile.fill.style.width = `${(figure.share || 0) * 100}%`;
            }
        }

        addTile(id) {
            const name = label("div", "qswap-figure-name");
            const value = label("div", "qswap-figure-value");
            const detail = label("div", "qswap-figure-detail");
            const fill = element("div", "qswap-meter-fill");
            const meter = element("div", "qswap-meter", fill);
            const root = element("div", `qswap-figure qswap-figure-${id}`, name, value, meter, detail);
            this.root.append(root);
            this.tiles.set(id, { root, name, value, detail, meter, fill });
        }
    }

    /** The legend of one model: each place with its layers and bytes. */
    class Legend {
        constructor() {
            this.root = element("div", "qswap-legend");
            this.entries = new Map();
            for (const place of qswap.words.PLACES) {
                this.add(place.id, place.label, place.says, `qswap-cell qswap-at-${place.id}`);
            }
            this.add("slow", "Waited for", "made the device wait in its last use", "qswap-cell qswap-at-none qswap-slow");
        }

        add(id, name, says, swatchClass) {
            const amount = label("span", "qswap-number");
            const entry = element(
                "span",
                "qswap-legend-entry",
                element("i", `qswap-swatch ${swatchClass}`),
                label("span", "qswap-legend-name", name),
                amount,
            );
            entry.title = `${name}: the layer ${says}.`;
            entry.dataset.place = id;
            this.root.append(entry);
            this.entries.set(id, { entry, amount });
        }

        update(layers) {
            const sums = qswap.words.tally(layers);
            for (const [id, { layers: number, bytes }] of Object.entries(sums)) {
                const { entry, amount } = this.entries.get(id);
                amount.setText(number ? `${number.toLocaleString("en")} · ${qswap.words.bytes(bytes)}` : "0");
                entry.classList.toggle("qswap-none", number === 0);
                show(entry, number > 0 || id !== "unknown");
            }
            const slow = layers.filter(qswap.words.isSlow).length;
            this.entries.get("slow").amount.setText(slow.toLocaleString("en"));
            show(this.entries.get("slow").entry, slow > 0);
        }
    }

    /** The strip: one cell a layer in execution order, in blocks; the mouse and the arrow keys read it. */
    class Strip {
        constructor(layers, tooltip) {
            this.layers = layers;
            this.tooltip = tooltip;
            this.cells = [];
            this.cursor = 0;
            this.root = element("div", "qswap-strip", ...this.build(layers));
            this.root.tabIndex = 0;
            this.root.setAttribute("role", "slider");
            this.root.setAttribute("aria-valuemin", "1");
            this.root.setAttribute("aria-valuemax", String(layers.length));
            this.root.addEventListener("pointerover", (event) => this.point(event.target));
            this.root.addEventListener("pointerleave", () => this.leave());
            this.root.addEventListener("focus", () => this.root.matches(":focus-visible") && this.read(this.cursor));
            this.root.addEventListener("blur", () => this.leave());
            this.root.addEventListener("keydown", (event) => this.key(event));
        }

        build(layers) {
            const largest = Math.max(1, ...layers.map((layer) => layer.bytes || 0));
            const many = layers.length;
            const widest = many <= 40 ? 44 : many <= 120 ? 26 : many <= 400 ? 12 : many <= 1000 ? 9 : 6;
            const narrowest = many <= 400 ? 5 : 3;
            const width = (layer) => Math.max(narrowest, widest * Math.sqrt((layer.bytes || 0) / largest));
            this.cells = layers.map((layer, index) => {
                const cell = document.createElement("i");
                const pixels = width(layer).toFixed(1);
                cell.style.flex = `${pixels} 1 ${pixels}px`;
                cell.dataset.i = String(index);
                return cell;
            });
            return qswap.words.sections(layers).map((section) => this.section(section, width));
        }

        section(section, width) {
            const widths = section.blocks.map((block) => {
                const cells = block.layers.reduce((sum, index) => sum + width(this.layers[index]) + 1, 0);
                return Math.max(cells, DIGIT_PX * (block.label || "").length);
            });
            const widest = Math.ceil(Math.max(...widths));
            // Blocks alike stand in columns; others flow, each as wide as it needs.
            const alike = section.blocks.length > 1 && widest <= 1.5 * Math.min(...widths);
            const blocks = section.blocks.map((block, nth) => {
                const made = element(
                    "div",
                    "qswap-block",
                    element("div", "qswap-cells", ...block.layers.map((index) => this.cells[index])),
                );
                if (block.label !== null) {
                    made.append(label("div", "qswap-block-label", block.label));
                }
                if (!alike) {
                    made.style.width = `min(100%, ${Math.ceil(widths[nth])}px)`;
                }
                return made;
            });
            const flow = element("div", alike ? "qswap-columns" : "qswap-flow", ...blocks);
            if (alike) {
                flow.style.gridTemplateColumns = `repeat(auto-fill, minmax(min(${widest}px, 100%), 1fr))`;
            }
            // Short sections stand beside each other.
            const short = widths.reduce((sum, each) => sum + each, 0) < SHORT_SECTION_PX;
            return element(
                "div",
                short ? "qswap-section qswap-short" : "qswap-section",
                label("div", "qswap-section-title", section.title),
                flow,
            );
        }

        update(name, layers) {
            this.layers = layers;
            layers.forEach((layer, index) => {
                const slow = qswap.words.isSlow(layer) ? " qswap-slow" : "";
                const className = `qswap-cell qswap-at-${qswap.words.placeOf(layer)}${slow}`;
                if (this.cells[index].className !== className) {
                    this.cells[index].className = className;
                }
            });
            setAttribute(this.root, "aria-label", summary(name, layers));
            this.say();
            if (this.tooltip.anchor && this.root.contains(this.tooltip.anchor)) {
                this.tooltip.show(this.tooltip.anchor, layers[this.tooltip.anchor.dataset.i]);
            }
        }

        say() {
            const layer = this.layers[this.cursor];
            const facts = qswap.words.facts(layer).map(([fact, value]) => `${fact} ${value}`);
            setAttribute(this.root, "aria-valuenow", String(this.cursor + 1));
            setAttribute(this.root, "aria-valuetext", [layer.name, ...facts].join(", "));
        }

        point(target) {
            if (target.dataset.i !== undefined) {
                this.tooltip.show(target, this.layers[target.dataset.i]);
            }
        }

        read(index) {
            this.cells[this.cursor].removeAttribute("data-cursor");
            this.cursor = index;
            this.cells[index].setAttribute("data-cursor", "");
            this.say();
            this.tooltip.show(this.cells[index], this.layers[index]);
        }

        leave() {
            this.cells[this.cursor].removeAttribute("data-cursor");
            this.tooltip.hide();
        }

        key(event) {
            const last = this.layers.length - 1;
            const target = {
                ArrowRight: this.cursor + 1,
                ArrowUp: this.cursor + 1,
                ArrowLeft: this.cursor - 1,
                ArrowDown: this.cursor - 1,
                PageDown: this.cursor + 10,
                PageUp: this.cursor - 10,
                Home: 0,
                End: last,
            }[event.key];
            if (target !== undefined) {
                event.preventDefault();
                this.read(Math.min(last, Math.max(0, target)));
            } else if (event.key === "Escape") {
                this.tooltip.hide();
            }
        }
    }

    function summary(name, layers) {
        const sums = qswap.words.tally(layers);
        const parts = qswap.words.PLACES.filter((place) => sums[place.id].layers).map(
            (place) => `${sums[place.id].layers} ${place.label.toLowerCase()}`,
        );
        return `${qswap.words.count(layers.length, "layer")} of ${name} in execution order: ${parts.join(", ")}`;
    }

    /** The layers as a table, for who reads better than looks; made when it is asked for. */
    class Table {
        constructor(layers) {
            this.rows = layers.map((layer, index) => {
                const place = label("td", "");
                const home = label("td", "");
                const uses = label("td", "qswap-right");
                const stall = label("td", "qswap-right");
                const row = element(
                    "tr",
                    "",
                    label("td", "qswap-right qswap-muted", String(index + 1)),
                    label("td", "qswap-name", String(layer.name)),
                    label("td", "", String(layer.kind || "–")),
                    label("td", "", String(layer.quant || "–")),
                    label("td", "qswap-right", qswap.words.bytes(layer.bytes)),
                    home,
                    place,
                    uses,
                    stall,
                );
                return { row, place, home, uses, stall };
            });
            const heads = ["#", "Layer", "Kind", "Format", "Size", "Home", "Now", "Uses", "Stall"];
            const right = new Set(["#", "Size", "Uses", "Stall"]);
            const head = element(
                "thead",
                "",
                element(
                    "tr",
                    "",
                    ...heads.map((text) => {
                        const cell = label("th", right.has(text) ? "qswap-right" : "", text);
                        cell.scope = "col";
                        return cell;
                    }),
                ),
            );
            const body = element("tbody", "", ...this.rows.map((each) => each.row));
            this.root = element("div", "qswap-table", element("table", "", head, body));
            this.root.tabIndex = 0;
            this.root.setAttribute("role", "region");
        }

        update(name, layers) {
            setAttribute(this.root, "aria-label", `Layers of ${name}`);
            layers.forEach((layer, index) => {
                const { place, home, uses, stall } = this.rows[index];
                const facts = new Map(qswap.words.facts(layer));
                home.setText(qswap.words.LOCATION_WORDS[layer.home] || "–");
                place.setText(facts.get("Now"));
                uses.setText(facts.get("Uses"));
                stall.setText(facts.get("Stall"));
            });
        }
    }

    /** One model: a line that opens to its numbers, its strip or table, and its legend. */
    class ModelCard {
        constructor(model, tooltip) {
            this.name = label("span", "qswap-model-name", String(model.name));
            this.pill = label("span", "qswap-pill");
            this.note = label("span", "qswap-muted qswap-model-note");
            const line = [this.name, this.pill, this.note];
            this.layered = qswap.words.list(model.layers).length > 0;
            if (!this.layered) {
                this.root = element("div", "qswap-model qswap-plain", ...line);
                return;
            }
            this.figures = new Figures();
            this.strip = new Strip(model.layers, tooltip);
            this.table = null;
            this.legend = new Legend();
            this.button = label("button", "qswap-button", "Table");
            this.button.type = "button";
            this.button.addEventListener("click", () => this.toggleTable());
            const head = element("summary", "qswap-model-head", caret(), ...line);
            this.legendLine = element("div", "qswap-legend-line", this.legend.root, this.button);
            this.root = element("details", "qswap-model", head, this.figures.root, this.legendLine, this.strip.root);
            // What the reader opened or closed stays so; until then the models that are active are open.
            this.touched = false;
            head.addEventListener("click", () => (this.touched = true));
            this.root.addEventListener("toggle", () => this.update(this.model, this.device));
        }

        update(model, device) {
            this.model = model;
            this.device = device;
            const managed = qswap.words.isManaged(model);
            this.pill.setText(!managed ? "Left to the host" : model.active ? "Active" : "Not loaded");
            setAttribute(this.pill, "data-tone", !managed ? "off" : model.active ? "on" : "off");
            this.root.classList.toggle("qswap-off", !managed || !model.active);
            this.note.setText(this.noteText(model, managed));
            this.root.style.order = model.active && managed ? "0" : managed ? "1" : "2";
            if (!this.layered) {
                return;
            }
            if (!this.touched && this.root.open !== Boolean(model.active)) {
                this.root.open = Boolean(model.active);
            }
            if (this.root.open) {
                this.figures.update(model, device);
                this.legend.update(model.layers);
                this.strip.update(model.name, model.layers);
                if (this.table && !this.table.root.hidden) {
                    this.table.update(model.name, model.layers);
                }
            }
        }

        noteText(model, managed) {
            if (!managed) {
                return String(model.reason || "QSwap does not manage this model");
            }
            const layers = qswap.words.list(model.layers);
            const formats = Array.from(new Set(layers.map((layer) => layer.quant).filter(Boolean)));
            return [
                layers.length ? qswap.words.count(layers.length, "layer") : String(model.reason || "no layers"),
                qswap.words.totalBytes(model) > 0 ? qswap.words.bytes(qswap.words.totalBytes(model)) : null,
                formats.length ? formats.slice(0, 4).join(", ") + (formats.length > 4 ? ", …" : "") : null,
            ]
                .filter(Boolean)
                .join(" · ");
        }

        toggleTable() {
            const toTable = !this.strip.root.hidden;
            if (!this.table) {
                this.table = new Table(this.model.layers);
                this.root.append(this.table.root);
            }
            this.table.update(this.model.name, this.model.layers);
            show(this.table.root, toTable);
            show(this.strip.root, !toTable);
            this.button.setText(toTable ? "Strip" : "Table");
        }
    }

    /** The latest messages: a fixed number of lines, filled from the top. */
    class Messages {
        constructor() {
            this.lines = Array.from({ length: MESSAGES_SHOWN }, () => {
                const level = label("span", "qswap-level");
                const time = label("time", "qswap-muted qswap-number");
                const text = label("span", "qswap-message-text");
                return { root: element("li", "qswap-message", level, time, text), level, time, text };
            });
            this.root = element("ul", "qswap-messages", ...this.lines.map((line) => line.root));
            this.root.setAttribute("aria-label", "Messages");
        }

        update(snapshot) {
            const latest = qswap.words.latestMessages(snapshot, MESSAGES_SHOWN);
            show(this.root, latest.length > 0);
            this.lines.forEach((line, nth) => {
                const message = latest[nth];
                show(line.root, Boolean(message));
                if (message) {
                    const alarming = message.level !== "info" && message.level !== "debug";
                    line.root.classList.toggle("qswap-alarming", alarming);
                    line.level.setText(alarming ? `⚠ ${message.level === "error" ? "Error" : "Warning"}` : "Note");
                    line.time.setText(qswap.words.clock(message.t));
                    line.text.setText(String(message.text));
                }
            });
        }
    }

    /** The facts of the layer under the pointer or the keyboard's cursor. */
    class Tooltip {
        constructor() {
            this.anchor = null;
            this.name = label("div", "qswap-tooltip-name");
            this.values = new Map();
            this.facts = element("dl", "");
            this.root = element("div", "qswap-tooltip", this.name, this.facts);
            this.root.hidden = true;
            this.root.setAttribute("role", "tooltip");
        }

        show(anchor, layer) {
            this.anchor = anchor;
            this.name.setText(String(layer.name));
            for (const [fact, value] of qswap.words.facts(layer)) {
                if (!this.values.has(fact)) {
                    this.values.set(fact, label("dd", ""));
                    this.facts.append(label("dt", "", fact), this.values.get(fact));
                }
                this.values.get(fact).setText(value);
            }
            show(this.root, true);
            const cell = anchor.getBoundingClientRect();
            const own = this.root.getBoundingClientRect();
            const left = Math.min(Math.max(8, cell.left + cell.width / 2 - own.width / 2), innerWidth - own.width - 8);
            const above = cell.top - own.height - 8;
            this.root.style.left = `${Math.max(8, left)}px`;
            this.root.style.top = `${above >= 8 ? above : cell.bottom + 8}px`;
        }

        hide() {
            this.anchor = null;
            show(this.root, false);
        }
    }

    /** All of the panel. `show` is cheap when little has changed. */
    qswap.View = class View {
        constructor(mount) {
            this.verdict = label("div", "qswap-verdict");
            this.location = label("span", "qswap-muted qswap-location");
            this.trouble = label("div", "qswap-trouble");
            this.trouble.setAttribute("role", "status");
            this.memory = new MemoryBar();
            this.models = element("div", "qswap-models");
            this.messages = new Messages();
            this.tooltip = new Tooltip();
            this.cards = [];
            this.keys = "";
            this.drawn = null;
            this.body = element("div", "qswap-body", this.memory.root, this.models, this.messages.root);
            this.root = element(
                "div",
                "qswap-root",
                element("div", "qswap-top", this.verdict, this.location),
                this.trouble,
                this.body,
                this.tooltip.root,
            );
            this.hideTooltip = () => this.tooltip.hide();
            window.addEventListener("scroll", this.hideTooltip, { capture: true, passive: true });
            mount.replaceChildren(this.root);
            this.show(null, null);
        }

        remove() {
            window.removeEventListener("scroll", this.hideTooltip, { capture: true });
            this.root.remove();
        }

        /** snapshot: the newest one, null before the first. trouble: one sentence when the server does not answer, else null. */
        show(snapshot, trouble) {
            show(this.trouble, trouble !== null);
            this.trouble.setText(trouble || "");
            this.root.classList.toggle("qswap-stale", trouble !== null);
            if (snapshot === null) {
                this.verdict.setText("Asking for the state of memory …");
                show(this.verdict, trouble === null);
                show(this.body, false);
            } else if (snapshot !== this.drawn) {
                this.draw(snapshot);
                this.drawn = snapshot;
            }
        }

        draw(snapshot) {
            const enabled = snapshot.enabled !== false;
            const verdict = enabled ? qswap.words.verdict(snapshot) : { tone: "off", text: qswap.words.whyOff(snapshot) };
            show(this.verdict, true);
            this.verdict.setText(verdict.text);
            setAttribute(this.verdict, "data-tone", verdict.tone);
            const location = qswap.words.LOCATION_WORDS[String(snapshot.location || "").toLowerCase()];
            show(this.location, enabled && Boolean(location));
            this.location.setText(`Swap location: ${location}`);
            show(this.body, enabled);
            if (!enabled) {
                return;
            }
            this.memory.update(snapshot);
            this.drawModels(qswap.words.list(snapshot.models), qswap.words.deviceWord(snapshot));
            this.messages.update(snapshot);
        }

        drawModels(models, device) {
            const key = (model) => [model.name, model.layout, qswap.words.list(model.layers).length];
            const keys = JSON.stringify(models.map(key));
            if (keys !== this.keys) {
                this.keys = keys;
                this.tooltip.hide();
                this.cards = models.map((model) => new ModelCard(model, this.tooltip));
                this.models.replaceChildren(...this.cards.map((card) => card.root));
            }
            models.forEach((model, nth) => this.cards[nth].update(model, device));
        }
    };
})();
