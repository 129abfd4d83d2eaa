/**
 * One model's layers, as the strip of cells, as the table, in the legend and in the tooltip.
 */
(function () {
    "use strict";

    const qswap = (window.qswap = window.qswap || {});
    const dom = (qswap.dom = qswap.dom || {});

    const SHORT_SECTION_PX = 240;
    const DIGIT_PX = 8;

    /** The strip: one cell a layer in execution order, in blocks; the mouse and the arrow keys read it. */
    qswap.Strip = class Strip {
        constructor(layers, tooltip) {
            this.tooltip = tooltip;
            this.cursor = 0;
            this.root = dom.element("div", "qswap-strip");
            this.root.tabIndex = 0;
            this.root.setAttribute("role", "slider");
            this.root.setAttribute("aria-valuemin", "1");
            this.root.addEventListener("pointerover", (event) => this.point(event.target));
            this.root.addEventListener("pointerleave", () => this.hideTooltip());
            this.root.addEventListener("focus", () => this.root.matches(":focus-visible") && this.read(this.cursor));
            this.root.addEventListener("blur", () => this.leave());
            this.root.addEventListener("keydown", (event) => this.key(event));
            this.setLayers(layers);
        }

        /** Shows other layers, in the same element. */
        setLayers(layers) {
            this.hideTooltip();
            this.layers = layers;
            this.cursor = Math.min(this.cursor, layers.length - 1);
            this.root.replaceChildren(...this.build(layers));
            if (this.root.matches(":focus-visible")) {
                this.cells[this.cursor].setAttribute("data-cursor", "");
            }
            dom.setAttribute(this.root, "aria-valuemax", String(layers.length));
            this.say();
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
                const made = dom.element(
                    "div",
                    "qswap-block",
                    dom.element("div", "qswap-cells", ...block.layers.map((index) => this.cells[index])),
                );
                if (block.label !== null) {
                    made.append(dom.label("div", "qswap-block-label", block.label));
                }
                if (!alike) {
                    made.style.width = `min(100%, ${Math.ceil(widths[nth])}px)`;
                }
                return made;
            });
            const flow = dom.element("div", alike ? "qswap-columns" : "qswap-flow", ...blocks);
            if (alike) {
                flow.style.gridTemplateColumns = `repeat(auto-fill, minmax(min(${widest}px, 100%), 1fr))`;
            }
            // Short sections stand beside each other.
            const short = widths.reduce((sum, each) => sum + each, 0) < SHORT_SECTION_PX;
            return dom.element(
                "div",
                short ? "qswap-section qswap-short" : "qswap-section",
                dom.label("div", "qswap-section-title", section.title),
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
            // Screen readers read out each change of what has the focus: there, only the keys change it.
            if (!this.root.matches(":focus")) {
                dom.setAttribute(this.root, "aria-label", summary(name, layers));
                this.say();
            }
            if (this.tooltip.anchor && this.root.contains(this.tooltip.anchor)) {
                this.tooltip.show(this.tooltip.anchor, layers[this.tooltip.anchor.dataset.i]);
            }
        }

        say() {
            const layer = this.layers[this.cursor];
            const facts = qswap.words.facts(layer).map(([fact, value]) => `${fact} ${value}`);
            dom.setAttribute(this.root, "aria-valuenow", String(this.cursor + 1));
            dom.setAttribute(this.root, "aria-valuetext", [layer.name, ...facts].join(", "));
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
            this.hideTooltip();
        }

        hideTooltip() {
            if (this.root.contains(this.tooltip.anchor)) {
                this.tooltip.hide();
            }
        }

        key(event) {
            if (event.altKey || event.ctrlKey || event.metaKey) {
                return; // The browser's own keys, such as the one that goes back.
            }
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
                const index = Math.min(last, Math.max(0, target));
                this.cells[index].scrollIntoView({ block: "nearest" });
                this.read(index);
            } else if (event.key === "Escape" && this.tooltip.anchor) {
                event.stopPropagation(); // Forge takes it for "Interrupt".
                this.tooltip.hide();
            }
        }
    };

    function summary(name, layers) {
        const sums = qswap.words.tally(layers);
        const parts = qswap.words.PLACES.filter((place) => sums[place.id].layers).map(
            (place) => `${sums[place.id].layers} ${place.label.toLowerCase()}`,
        );
        return `${qswap.words.count(layers.length, "layer")} of ${name} in execution order: ${parts.join(", ")}`;
    }

    /** The layers as a table, for who reads better than looks; made when it is asked for. */
    qswap.Table = class Table {
        constructor(layers) {
            const heads = ["#", "Layer", "Kind", "Format", "Size", "Home", "Now", "Uses", "Stall"];
            const right = new Set(["#", "Size", "Uses", "Stall"]);
            const head = dom.element(
                "thead",
                "",
                dom.element(
                    "tr",
                    "",
                    ...heads.map((text) => {
                        const cell = dom.label("th", right.has(text) ? "qswap-right" : "", text);
                        cell.scope = "col";
                        return cell;
                    }),
                ),
            );
            this.body = dom.element("tbody", "");
            this.setLayers(layers);
            this.root = dom.element("div", "qswap-table", dom.element("table", "", head, this.body));
            this.root.tabIndex = 0;
            this.root.setAttribute("role", "region");
        }

        setLayers(layers) {
            this.rows = layers.map((layer, index) => {
                const place = dom.label("td", "");
                const home = dom.label("td", "");
                const uses = dom.label("td", "qswap-right");
                const stall = dom.label("td", "qswap-right");
                const row = dom.element(
                    "tr",
                    "",
                    dom.label("td", "qswap-right qswap-muted", String(index + 1)),
                    dom.label("td", "qswap-name", String(layer.name)),
                    dom.label("td", "", String(layer.kind || "–")),
                    dom.label("td", "", String(layer.quant || "–")),
                    dom.label("td", "qswap-right", qswap.words.bytes(layer.bytes)),
                    home,
                    place,
                    uses,
                    stall,
                );
                return { row, place, home, uses, stall };
            });
            this.body.replaceChildren(...this.rows.map((each) => each.row));
        }

        update(name, layers) {
            dom.setAttribute(this.root, "aria-label", `Layers of ${name}`);
            layers.forEach((layer, index) => {
                const { place, home, uses, stall } = this.rows[index];
                const facts = new Map(qswap.words.facts(layer));
                home.setText(qswap.words.LOCATION_WORDS[layer.home] || "–");
                place.setText(facts.get("Now"));
                uses.setText(facts.get("Uses"));
                stall.setText(facts.get("Stall"));
            });
        }
    };

    /** The legend of one model: each place with its layers and bytes. */
    qswap.Legend = class Legend {
        constructor() {
            this.root = dom.element("div", "qswap-legend");
            this.entries = new Map();
            for (const place of qswap.words.PLACES) {
                this.add(place.id, place.label, place.says, `qswap-cell qswap-at-${place.id}`);
            }
            this.add("slow", "Waited for", "made the device wait in its last use", "qswap-cell qswap-at-none qswap-slow");
        }

        add(id, name, says, swatchClass) {
            const amount = dom.label("span", "qswap-number");
            const entry = dom.element(
                "span",
                "qswap-legend-entry",
                dom.element("i", `qswap-swatch ${swatchClass}`),
                dom.label("span", "qswap-legend-name", name),
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
                dom.show(entry, number > 0 || id !== "unknown");
            }
            const slow = layers.filter(qswap.words.isSlow).length;
            this.entries.get("slow").amount.setText(slow.toLocaleString("en"));
            dom.show(this.entries.get("slow").entry, slow > 0);
        }
    };

    /** The facts of the layer under the pointer or the keyboard's cursor. */
    qswap.Tooltip = class Tooltip {
        constructor() {
            this.anchor = null;
            this.name = dom.label("div", "qswap-tooltip-name");
            this.values = new Map();
            this.facts = dom.element("dl", "");
            this.root = dom.element("div", "qswap-tooltip", this.name, this.facts);
            this.root.hidden = true;
            this.root.setAttribute("role", "tooltip");
        }

        show(anchor, layer) {
            this.anchor = anchor;
            this.name.setText(String(layer.name));
            for (const [fact, value] of qswap.words.facts(layer)) {
                if (!this.values.has(fact)) {
                    this.values.set(fact, dom.label("dd", ""));
                    this.facts.append(dom.label("dt", "", fact), this.values.get(fact));
                }
                this.values.get(fact).setText(value);
            }
            dom.show(this.root, true);
            this.place();
        }

        /** Beside its cell, and all of it in sight. */
        place() {
            const cell = this.anchor.getBoundingClientRect();
            const own = this.root.getBoundingClientRect();
            const left = Math.min(Math.max(8, cell.left + cell.width / 2 - own.width / 2), innerWidth - own.width - 8);
            const above = cell.top - own.height - 8;
            this.root.style.left = `${Math.max(8, left)}px`;
            const below = Math.max(8, Math.min(cell.bottom + 8, innerHeight - own.height - 8));
            this.root.style.top = `${above >= 8 ? above : below}px`;
        }

        /** Goes with the cell that the keys have chosen; away from the mouse, which has another one under it now. */
        scroll() {
            const cell = this.anchor && this.anchor.getBoundingClientRect();
            if (cell && this.anchor.hasAttribute("data-cursor") && cell.bottom > 0 && cell.top < innerHeight) {
                this.place();
            } else {
                this.hide();
            }
        }

        hide() {
            this.anchor = null;
            dom.show(this.root, false);
        }
    };
})();
