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
    const dom = (qswap.dom = qswap.dom || {});

    const MESSAGES_SHOWN = 4;
    const SPOKEN_MS = 5000; // Then it is no news to who comes to read the page.

    /** The bar of the device's memory with its key. */
    class MemoryBar {
        constructor() {
            this.title = dom.label("span", "qswap-memory-title");
            this.total = dom.label("span", "qswap-muted");
            this.bar = dom.element("div", "qswap-bar");
            this.bar.setAttribute("role", "img");
            this.key = dom.element("div", "qswap-key");
            this.parts = new Map();
            this.root = dom.element(
                "section",
                "qswap-memory",
                dom.element("div", "qswap-memory-head", this.title, this.total),
                this.bar,
                this.key,
            );
        }

        update(snapshot) {
            const memory = qswap.words.deviceMemory(snapshot);
            dom.show(this.root, memory !== null);
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
                dom.show(segment, part.bytes > 0);
                dom.show(entry, part.bytes > 0);
                size.setText(qswap.words.bytes(part.bytes));
                if (part.bytes > 0) {
                    said.push(`${part.label} ${qswap.words.bytes(part.bytes)}`);
                }
            }
            dom.setAttribute(this.bar, "aria-label", `${qswap.words.bytes(memory.total)}: ${said.join(", ")}`);
        }

        addPart(part) {
            const size = dom.label("span", "qswap-number");
            const swatch = dom.element("i", `qswap-swatch qswap-part-${part.id}`);
            const entry = dom.element("span", "qswap-key-entry", swatch, dom.label("span", "qswap-muted", part.label), size);
            const segment = dom.element("div", `qswap-segment qswap-part-${part.id}`);
            this.bar.append(segment);
            this.key.append(entry);
            this.parts.set(part.id, { segment, entry, size });
        }
    }

    /** The numbers of one model. */
    class Figures {
        constructor() {
            this.root = dom.element("div", "qswap-figures");
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
            const name = dom.label("div", "qswap-figure-name");
            const value = dom.label("div", "qswap-figure-value");
            const detail = dom.label("div", "qswap-figure-detail");
            const fill = dom.element("div", "qswap-meter-fill");
            const meter = dom.element("div", "qswap-meter", fill);
            const root = dom.element("div", `qswap-figure qswap-figure-${id}`, name, value, meter, detail);
            this.root.append(root);
            this.tiles.set(id, { root, name, value, detail, meter, fill });
        }
    }

    /** One model: a line that opens to its numbers, its strip or table, and its legend. */
    class ModelCard {
        constructor(model, tooltip) {
            this.name = String(model.name);
            this.pill = dom.label("span", "qswap-pill");
            this.note = dom.label("span", "qswap-muted qswap-model-note");
            const line = [dom.label("span", "qswap-model-name", this.name), this.pill, this.note];
            this.layered = hasLayers(model);
            if (!this.layered) {
                this.root = dom.element("div", "qswap-model qswap-plain", ...line);
                return;
            }
            this.figures = new Figures();
            this.layout = model.layout;
            this.strip = new qswap.Strip(model.layers, tooltip);
            this.table = null;
            this.legend = new qswap.Legend();
            this.button = dom.label("button", "qswap-button", "Table");
            this.button.type = "button";
            this.button.addEventListener("click", () => this.toggleTable());
            const head = dom.element("summary", "qswap-model-head", dom.caret(), ...line);
            this.legendLine = dom.element("div", "qswap-legend-line", this.legend.root, this.button);
            this.root = dom.element("details", "qswap-model", head, this.figures.root, this.legendLine, this.strip.root);
            // What the reader opened or closed (the browser's search does, too) stays so; until then the models that are active
            // are open.
            this.touched = false;
            this.set = false;
            this.root.addEventListener("toggle", () => {
                this.touched = this.touched || this.root.open !== this.set;
                this.update(this.model, this.device);
            });
        }

        /** Whether this card can show that model, with other layers perhaps. */
        fits(model) {
            return this.name === String(model.name) && this.layered === hasLayers(model);
        }

        remove() {
            if (this.layered) {
                this.strip.leave();
            }
            this.root.remove();
        }

        update(model, device) {
            this.model = model;
            this.device = device;
            const managed = qswap.words.isManaged(model);
            this.pill.setText(!managed ? "Left to the host" : model.active ? "Active" : "Not loaded");
            dom.setAttribute(this.pill, "data-tone", !managed ? "off" : model.active ? "on" : "off");
            this.root.classList.toggle("qswap-off", !managed || !model.active);
            this.note.setText(this.noteText(model, managed));
            this.root.style.order = model.active && managed ? "0" : managed ? "1" : "2";
            if (!this.layered) {
                return;
            }
            if (this.layout !== model.layout || this.strip.layers.length !== model.layers.length) {
                this.layout = model.layout;
                this.strip.setLayers(model.layers);
                if (this.table) {
                    this.table.setLayers(model.layers);
                }
            }
            // A card that closes takes the keyboard's focus away: not while it is in there.
            const open = Boolean(model.active) || (this.root.open && this.root.matches(":focus-within"));
            if (!this.touched && this.root.open !== open) {
                this.root.open = this.set = open;
            }
            if (this.root.open) {
                this.figures.update(model, device);
                this.legend.update(model.layers);
                this.strip.update(model.name, model.layers);
                if (this.table && !this.table.root.hidden) {
                    this.table.update(model.name, model.layers);
                }
            } else {
                this.strip.leave();
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
                this.table = new qswap.Table(this.model.layers);
                this.root.append(this.table.root);
            }
            this.table.update(this.model.name, this.model.layers);
            dom.show(this.table.root, toTable);
            dom.show(this.strip.root, !toTable);
            this.button.setText(toTable ? "Strip" : "Table");
        }
    }

    function hasLayers(model) {
        return qswap.words.list(model.layers).length > 0;
    }

    /** The latest messages: a fixed number of lines, filled from the top. */
    class Messages {
        constructor() {
            this.lines = Array.from({ length: MESSAGES_SHOWN }, () => {
                const level = dom.label("span", "qswap-level");
                const time = dom.label("time", "qswap-muted qswap-number");
                const text = dom.label("span", "qswap-message-text");
                return { root: dom.element("li", "qswap-message", level, time, text), level, time, text };
            });
            this.root = dom.element("ul", "qswap-messages", ...this.lines.map((line) => line.root));
            this.root.setAttribute("aria-label", "Messages");
        }

        update(snapshot) {
            const latest = qswap.words.latestMessages(snapshot, MESSAGES_SHOWN);
            dom.show(this.root, latest.length > 0);
            this.lines.forEach((line, nth) => {
                const message = latest[nth];
                dom.show(line.root, Boolean(message));
                if (message) {
                    const alarming = qswap.words.isAlarming(message);
                    line.root.classList.toggle("qswap-alarming", alarming);
                    line.level.setText((alarming ? "⚠ " : "") + qswap.words.levelWord(message));
                    line.time.setText(qswap.words.clock(message.t));
                    line.text.setText(String(message.text));
                }
            });
        }
    }

    /** All of the panel. `show` is cheap when little has changed. */
    qswap.View = class View {
        constructor(mount) {
            this.verdict = dom.label("div", "qswap-verdict");
            this.location = dom.label("span", "qswap-muted qswap-location");
            this.trouble = dom.label("div", "qswap-trouble");
            this.fault = dom.label("div", "qswap-fault");
            // Apart from what is seen, which changes all the time: screen readers read out every change of this one.
            this.spoken = dom.label("div", "qswap-spoken");
            this.spoken.setAttribute("role", "status");
            this.memory = new MemoryBar();
            this.models = dom.element("div", "qswap-models");
            this.messages = new Messages();
            this.tooltip = new qswap.Tooltip();
            this.cards = [];
            this.drawn = null;
            this.body = dom.element("div", "qswap-body", this.memory.root, this.models, this.messages.root);
            this.root = dom.element(
                "div",
                "qswap-root",
                dom.element("div", "qswap-top", this.verdict, this.location),
                this.trouble,
                this.body,
                this.fault,
                this.spoken,
                this.tooltip.root,
            );
            dom.show(this.fault, false);
            this.onScroll = () => this.tooltip.scroll();
            window.addEventListener("scroll", this.onScroll, { capture: true, passive: true });
            mount.replaceChildren(this.root);
            this.show(null, null);
        }

        remove() {
            clearTimeout(this.silence);
            window.removeEventListener("scroll", this.onScroll, { capture: true });
            this.root.remove();
        }

        /** snapshot: the newest one, null before the first. trouble: one sentence when the server does not answer, else null. */
        show(snapshot, trouble) {
            dom.show(this.trouble, trouble !== null);
            this.trouble.setText(trouble || "");
            this.root.classList.toggle("qswap-stale", trouble !== null);
            if (snapshot === null) {
                this.verdict.setText("Asking for the state of memory …");
                dom.show(this.verdict, trouble === null);
                dom.show(this.body, false);
            } else if (snapshot !== this.drawn) {
                this.drawn = snapshot;
                this.tryToDraw(snapshot);
            }
        }

        /** An error costs no more than this picture: the next one may be drawn again. */
        tryToDraw(snapshot) {
            try {
                this.draw(snapshot);
                dom.show(this.fault, false);
            } catch (error) {
                const text = `Not all of this could be drawn (${error}).`;
                if (text !== this.fault.textContent) {
                    console.error("QSwap:", error);
                }
                this.fault.setText(text);
                dom.show(this.fault, true);
            }
        }

        /** Has screen readers read these sentences. */
        say(sentences) {
            const text = sentences.join(" ");
            if (text) {
                clearTimeout(this.silence);
                // The same once more is a change, too.
                this.spoken.setText(text === this.spoken.textContent ? `${text}\u00a0` : text);
                this.silence = setTimeout(() => this.spoken.setText(""), SPOKEN_MS);
            }
        }

        draw(snapshot) {
            const enabled = snapshot.enabled !== false;
            const verdict = enabled ? qswap.words.verdict(snapshot) : { tone: "off", text: qswap.words.whyOff(snapshot) };
            dom.show(this.verdict, true);
            this.verdict.setText(verdict.text);
            dom.setAttribute(this.verdict, "data-tone", verdict.tone);
            const location = qswap.words.LOCATION_WORDS[String(snapshot.location || "").toLowerCase()];
            const kernel = snapshot.unpack_kernel ? ` · unpacked by ${snapshot.unpack_kernel}` : "";
            dom.show(this.location, enabled && Boolean(location));
            this.location.setText(`Swap location: ${location}${kernel}`);
            dom.show(this.body, enabled);
            if (!enabled) {
                return;
            }
            this.memory.update(snapshot);
            this.drawModels(qswap.words.list(snapshot.models), qswap.words.deviceWord(snapshot));
            this.messages.update(snapshot);
        }

        /** Cards stay where they are as long as their models do: a new one, or one that moves, loses the keyboard's focus. */
        drawModels(models, device) {
            const free = new Set(this.cards);
            const take = (fits) => {
                const found = Array.from(free).find(fits) || null;
                free.delete(found);
                return found;
            };
            const same = models.map((model) => take((card) => card.fits(model) && card.layout === model.layout));
            this.cards = models.map(
                (model, nth) => same[nth] || take((card) => card.fits(model)) || new ModelCard(model, this.tooltip),
            );
            free.forEach((card) => card.remove());
            for (const card of this.cards) {
                if (card.root.parentNode !== this.models) {
                    this.models.append(card.root);
                }
            }
            models.forEach((model, nth) => this.cards[nth].update(model, device));
        }
    };
})();
