/**
 * What the panel says: a snapshot's numbers in words, its layers in blocks, its states by name. Knows nothing of the page.
 */
(function () {
    "use strict";

    const qswap = (window.qswap = window.qswap || {});

    // As in routes.py: the characters of the short form index these.
    const STATES = ["resident", "swapped", "fetching", "ready", "in_use"];
    const HOMES = ["shared", "cpu", "disk"];

    /** Where a layer's weights can be, in the order of the legend: on the device, on the way, at home. */
    const PLACES = [
        { id: "resident", label: "Resident", says: "has a permanent copy on the device" },
        { id: "in_use", label: "In use", says: "is computing now" },
        { id: "ready", label: "Ready in ring", says: "has been fetched and waits on the device for its turn" },
        { id: "fetching", label: "On its way", says: "is being copied to the device" },
        { id: "shared", label: "Shared", says: "is swapped; its home is page-locked RAM" },
        { id: "cpu", label: "CPU", says: "is swapped; its home is pageable RAM" },
        { id: "disk", label: "Disk", says: "is swapped; its home is the model file" },
        { id: "unknown", label: "Unknown", says: "is in a state that this page does not know" },
    ];
    const HOME_WORDS = { shared: "Shared (page-locked RAM)", cpu: "CPU (pageable RAM)", disk: "Disk (the model file)" };
    const LOCATION_WORDS = { auto: "Auto", gpu: "GPU", shared: "Shared", cpu: "CPU", disk: "Disk" };

    // A layer is marked when its last use made the device wait for longer than this.
    const NOTABLE_STALL_US = 500;

    const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
    const list = (value) => (Array.isArray(value) ? value : []);

    /** Bytes in units of 1024, as Forge and task managers show them. */
    function bytes(count) {
        if (!isNumber(count)) {
            return "–";
        }
        let value = count;
        let unit = "B";
        for (const next of ["KB", "MB", "GB", "TB"]) {
            if (Math.abs(value) < 999.5) {
                break;
            }
            value /= 1024;
            unit = next;
        }
        const digits = unit === "B" || Math.abs(value) >= 99.95 || (unit !== "GB" && Math.abs(value) >= 9.95) ? 0 : 1;
        return `${value.toFixed(digits)} ${unit}`;
    }

    function seconds(value) {
        if (!isNumber(value)) {
            return "–";
        }
        if (value >= 99.95) {
            return `${value.toFixed(0)} s`;
        }
        return value >= 0.9995 ? `${value.toFixed(2)} s` : `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
    }

    function percent(share) {
        if (!isNumber(share)) {
            return "–";
        }
        // "100 %" and "0 %" are promises: nearly all and nearly none are said otherwise.
        const rounded = Math.round(share * 100);
        if (rounded === 100 && share < 1) {
            return "99 %";
        }
        return rounded === 0 && share > 0 ? "< 1 %" : `${rounded} %`;
    }

    function count(number, one, many) {
        return `${number.toLocaleString("en")} ${number === 1 ? one : many || one + "s"}`;
    }

    /** The place (an id of PLACES) that a layer's cell is painted as. */
    function placeOf(layer) {
        const place = layer.state === "swapped" ? layer.home : layer.state;
        return PLACES.some((known) => known.id === place) ? place : "unknown";
    }

    const isSlow = (layer) => layer.stall_us >= NOTABLE_STALL_US;

    /** {place id: {layers, bytes}} for every place. */
    function tally(layers) {
        const sums = Object.fromEntries(PLACES.map((place) => [place.id, { layers: 0, bytes: 0 }]));
        for (const layer of layers) {
            const sum = sums[placeOf(layer)];
            sum.layers += 1;
            sum.bytes += layer.bytes || 0;
        }
        return sums;
    }

    function totalBytes(model) {
        const total = model.bytes && model.bytes.total;
        return isNumber(total) ? total : list(model.layers).reduce((sum, layer) => sum + (layer.bytes || 0), 0);
    }

    /** Of the weights that stay on the device: resident layers, and parameters that cannot swap. */
    function stayingBytes(model) {
        const { resident, fixed } = model.bytes || {};
        return (isNumber(resident) ? resident : tally(list(model.layers)).resident.bytes) + (fixed || 0);
    }

    function stayingShare(model) {
        const total = totalBytes(model);
        return total > 0 ? Math.min(1, stayingBytes(model) / total) : null;
    }

    /** The share of the last step that the device spent waiting for transfers; null before the first step. */
    function stallShare(model) {
        const step = model.step || {};
        return isNumber(step.stall_s) && step.seconds > 0 ? Math.min(1, step.stall_s / step.seconds) : null;
    }

    const isManaged = (model) => model.managed !== false;

    /** What to call the device: the demo also runs where there is no GPU. */
    function deviceWord(snapshot) {
        return /^(cuda|hip|xpu|mps)/.test(String(snapshot.device)) ? "GPU" : "device";
    }

    /** The one sentence at the top: how much is on the device, what travels, does it stall. tone: good, wait, idle. */
    function verdict(snapshot) {
        const models = list(snapshot.models);
        const device = deviceWord(snapshot);
        const active = models.filter((each) => each.active && isManaged(each) && list(each.layers).length > 0);
        // A text encoder keeps residents while the transformer runs: the one that ran last is meant.
        const model = active.reduce((last, each) => (last && !(each.used_at > last.used_at) ? last : each), null);
        if (!model) {
            return {
                tone: "idle",
                text: models.length ? `No model of QSwap is on the ${device} now.` : "No model is loaded yet. Start a generation.",
            };
        }
        const share = stayingShare(model);
        const travels = model.bytes && model.bytes.swapped_per_step;
        const stall = stallShare(model);
        if (share === 1) {
            return { tone: "good", text: `All of ${model.name} is on the ${device}. Nothing travels.` };
        }
        let text = `${percent(share)} of ${model.name} stays on the ${device}`;
        if (travels === 0) {
            return { tone: "good", text: `${text}. Nothing travels: what the rest gives is kept.` };
        }
        if (isNumber(travels)) {
            text += `, ${bytes(travels)} travel in each step`;
        }
        if (stall === null) {
            return { tone: "idle", text: `${text}.` };
        }
        if (stall < 0.03) {
            return { tone: "good", text: `${text}, hidden behind the computation.` };
        }
        return { tone: "wait", text: `${text}, and the ${device} waits for them ${percent(stall)} of the time.` };
    }

    /** The five numbers of a model: [{id, label, value, detail, share}], share in 0..1 for those with a bar. */
    function figures(model, device) {
        const size = model.bytes || {};
        const step = model.step || {};
        const stall = stallShare(model);
        const rate = isNumber(step.h2d_bytes) && step.seconds > 0 ? step.h2d_bytes / step.seconds : null;
        const bound =
            step.bound_s > step.compute_s * 1.02
                ? "; the link is the limit: more free GPU memory helps, or a smaller image"
                : "";
        return [
            {
                id: "resident",
                label: `On the ${device}`,
                value: percent(stayingShare(model)),
                detail: `${bytes(stayingBytes(model))} of ${bytes(totalBytes(model))}`,
                share: stayingShare(model),
            },
            {
                id: "travels",
                label: "Travels each step",
                value: bytes(size.swapped_per_step),
                detail:
                    (rate === null ? "no step yet" : `at ${bytes(rate)}/s`) +
                    (size.spared_per_step ? `; ${bytes(size.spared_per_step)} spared: prompt and steps seen before` : ""),
            },
            {
                id: "step",
                label: isNumber(step.index) ? `Step ${step.index}${isNumber(step.of) ? ` of ${step.of}` : ""}` : "Step",
                value: seconds(step.seconds),
                detail: isNumber(step.compute_s) ? `${seconds(step.compute_s)} of it computing` : "no step yet",
            },
            {
                id: "stall",
                label: "Stall",
                value: seconds(step.stall_s),
                detail:
                    stall === null
                        ? "no step yet"
                        : stall < 0.03
                          ? `${percent(stall)} of the step`
                          : `${percent(stall)} of the step${bound}`,
                share: stall,
                bad: stall !== null && stall >= 0.03,
            },
            {
                id: "pinned",
                label: "Page-locked RAM",
                value: bytes(size.pinned),
                detail: isNumber(size.pin_budget) ? `of ${bytes(size.pin_budget)} allowed` : "no limit known",
                share: size.pin_budget > 0 && isNumber(size.pinned) ? Math.min(1, size.pinned / size.pin_budget) : null,
            },
        ];
    }

    /** The device's memory by owner: {total, parts: [{id, label, bytes}]}; null where it is not known. */
    function deviceMemory(snapshot) {
        const memory = snapshot.device_memory || {};
        if (!(memory.total > 0)) {
            return null;
        }
        const all = (field) => list(snapshot.models).map((model) => (model.bytes && model.bytes[field]) || 0);
        const sum = (field) => all(field).reduce((total, each) => total + each, 0);
        const shared = (field) => Math.max(0, ...all(field)); // one for all models of the device
        const parts = [
            { id: "fixed", label: "Fixed", bytes: sum("fixed") },
            { id: "resident", label: "Resident", bytes: sum("resident") },
            { id: "ring", label: "Ring", bytes: shared("ring") },
            { id: "scratch", label: "Unpacking", bytes: shared("scratch") },
        ];
        const known = parts.reduce((total, part) => total + part.bytes, 0);
        const free = Math.max(0, memory.free || 0);
        const other = isNumber(memory.other) ? memory.other : memory.total - free - Math.max(known, memory.weights || 0);
        parts.push({ id: "weights", label: "Other weights", bytes: Math.max(0, (memory.weights || 0) - known) });
        parts.push({ id: "other", label: "Everything else", bytes: Math.max(0, other) });
        parts.push({ id: "free", label: "Free", bytes: free });
        return { total: memory.total, parts };
    }

    /**
     * Layers in execution order as sections of blocks: [{title, blocks: [{label, layers: [index…]}]}].
     *
     * "double_blocks.3.img_mlp.0" is in section "double_blocks", block 3. A number at the end of a name belongs to the layer
     * itself. Neighbours without a block share a section.
     */
    function sections(layers) {
        const result = [];
        layers.forEach((layer, index) => {
            const parts = String(layer.name).split(".");
            const at = parts.findIndex((part, i) => i > 0 && i < parts.length - 1 && /^\d+$/.test(part));
            const title = at < 0 ? null : parts.slice(0, at).join(".");
            const label = at < 0 ? null : parts[at];
            let section = result[result.length - 1];
            if (!section || section.title !== title) {
                section = { title, names: new Set(), blocks: [] };
                result.push(section);
            }
            section.names.add(parts[0]);
            let block = section.blocks[section.blocks.length - 1];
            if (!block || block.label !== label) {
                block = { label, layers: [] };
                section.blocks.push(block);
            }
            block.layers.push(index);
        });
        for (const section of result) {
            if (section.title === null) {
                const names = Array.from(section.names);
                section.title = names.slice(0, 3).join(", ") + (names.length > 3 ? ", …" : "");
            }
        }
        return result;
    }

    /** A layer's facts, for its tooltip and its row: [[label, value]…]. */
    function facts(layer) {
        const place = PLACES.find((each) => each.id === placeOf(layer));
        return [
            ["Kind", [layer.kind, layer.quant].filter(Boolean).join(", ") || "–"],
            ["Size", bytes(layer.bytes) + (isNumber(layer.params) ? `, ${millions(layer.params)} parameters` : "")],
            ["Now", layer.state === "swapped" ? "Swapped" : place.label],
            ["Home", HOME_WORDS[layer.home] || "–"],
            ["Uses", isNumber(layer.uses) ? layer.uses.toLocaleString("en") : "–"],
            ["Stall", layer.stall_us > 0 ? `${seconds(layer.stall_us / 1e6)} in the last use` : "none"],
        ];
    }

    function millions(number) {
        if (number >= 1e9) {
            return `${(number / 1e9).toFixed(1)} B`;
        }
        return number >= 1e6 ? `${(number / 1e6).toFixed(1)} M` : number.toLocaleString("en");
    }

    const isAlarming = (message) => message.level !== "info" && message.level !== "debug";

    function levelWord(message) {
        return !isAlarming(message) ? "Note" : message.level === "error" ? "Error" : "Warning";
    }

    /** The newest messages, oldest first, at most `most`; a warning is kept longer than what only informs. */
    function latestMessages(snapshot, most) {
        const all = list(snapshot.messages).slice(-40);
        const warnings = all.filter(isAlarming).slice(-most);
        const others = all.filter((message) => !warnings.includes(message)).slice(-Math.max(1, most - warnings.length));
        return all.filter((message) => warnings.includes(message) || others.includes(message)).slice(-most);
    }

    /** What has happened between two snapshots that somebody who does not look wants to hear, in sentences. */
    function news(before, after) {
        const managed = (snapshot) => list(snapshot.models).filter(isManaged);
        const names = (models) => Array.from(new Set(models.map((model) => String(model.name))));
        const active = (snapshot) => names(managed(snapshot).filter((model) => model.active));
        const stepping = (snapshot) => names(managed(snapshot).filter(hasStepsToCome));
        const without = (all, some) => all.filter((each) => !some.includes(each));
        const there = names(managed(after));
        const known = new Map(list(before.messages).map((message) => [gist(message), message.t]));
        const isNew = (message) =>
            message.level === "error" ? message.t !== known.get(gist(message)) : !known.has(gist(message));
        const alarms = latestMessages(after, 4).filter(isAlarming);
        return [
            ...without(active(after), active(before)).map((name) => `${name} is loaded.`),
            ...without(stepping(before), stepping(after))
                .filter((name) => there.includes(name))
                .map((name) => `${name} comes to the end of its steps.`),
            ...alarms
                .filter(isNew)
                .map((message) => `${levelWord(message)}: ${message.text}`),
        ];
    }

    function hasStepsToCome(model) {
        const { index, of } = model.step || {};
        return of > 1 && index < of;
    }

    /** A message without its amounts of memory: with others it says the same again. */
    function gist(message) {
        return String(message.text).replace(/\d+(\.\d+)?(?= [MG]B\b)/g, "");
    }

    /** That QSwap is off, and why as far as its host says so. */
    function whyOff(snapshot) {
        const host = snapshot.host || {};
        const settings = snapshot.settings || {};
        const reason = (host.supported === false && host.reason) || host.error;
        if (reason) {
            return `QSwap is off: ${reason}`;
        }
        return settings.qswap_enabled ? "QSwap is off until the next generation." : "QSwap is off.";
    }

    function clock(t) {
        // Seconds since 1970; anything else is not a time of day.
        return isNumber(t) && t > 1e9 ? new Date(t * 1000).toLocaleTimeString("en-GB") : "";
    }

    function unfoldLayers(layout, changing) {
        return list(layout).map((layer, i) => ({
            ...layer,
            state: STATES[changing.state[i]],
            home: HOMES[changing.home[i]],
            uses: changing.uses[i],
            stall_us: changing.stall_us[i],
        }));
    }

    qswap.words = {
        PLACES,
        LOCATION_WORDS,
        bytes,
        clock,
        count,
        deviceMemory,
        deviceWord,
        facts,
        figures,
        isAlarming,
        isManaged,
        isSlow,
        latestMessages,
        levelWord,
        list,
        news,
        percent,
        placeOf,
        sections,
        tally,
        totalBytes,
        unfoldLayers,
        verdict,
        whyOff,
    };
})();
