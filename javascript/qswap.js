/**
 * Finds the panel's elements in the page, asks the server for news while one of them is seen, and hands the news to their views.
 *
 * The page may come late, be replaced by Gradio at any time, and hold several panels (txt2img and img2img): they share one poll.
 * The only global is `qswap`; the other files here add their parts to it, in any order of loading.
 */
(function () {
    "use strict";

    const qswap = (window.qswap = window.qswap || {});

    const ANSWER_TIMEOUT_MS = 10000;
    const LONGEST_WAIT_MS = 30000;
    const LONGEST_REST_MS = 2000;
    const SCAN_DELAY_MS = 100;
    const HIGHEST_HZ = 10;

    /** An error that the panel explains. */
    function problem(trouble) {
        return Object.assign(new Error(trouble), { trouble });
    }

    /** One poll of one server, shared by all panels that name it. */
    class Feed {
        constructor(base) {
            this.url = base ? base + "/qswap/v1/residency" : "qswap/v1/residency";
            this.panels = new Set();
            this.layouts = new Map(); // layout hash -> the layers' fields that never change
            this.snapshot = null;
            this.text = null;
            this.failures = 0;
            this.trouble = null; // why the last answer did not come, and the sentence that says so
            this.sentence = null;
            this.timer = null;
            this.asking = false;
        }

        /** Polls if someone looks and stops if nobody does; called whenever either may have changed. */
        wake() {
            clearTimeout(this.timer);
            this.timer = null;
            if (!this.asking && this.hz() > 0) {
                this.ask();
            }
        }

        /** The rate that the host's settings give by now, else that of the fastest panel; 0 when none is seen. */
        hz() {
            if (document.visibilityState !== "visible") {
                return 0;
            }
            const setting = Number(this.snapshot?.settings?.qswap_panel_hz) || 0;
            const chosen = Math.min(HIGHEST_HZ, Math.max(0, setting));
            return Math.max(0, ...Array.from(this.panels, (panel) => (panel.seen ? chosen || panel.hz : 0)));
        }

        async ask() {
            this.asking = true;
            const began = performance.now();
            let trouble = null;
            let news = [];
            try {
                news = this.read(await this.fetchOnce());
                this.failures = 0;
            } catch (error) {
                this.failures += 1;
                trouble =
                    error.trouble ||
                    (error.name === "AbortError" ? "The server does not answer" : "No connection to the server");
            }
            this.asking = false;

            const hz = this.hz();
            const took = performance.now() - began;
            // A server that is slow to answer has other things to do: it rests for as long as it took. (Or the page stood still.)
            const wait = trouble
                ? Math.min(LONGEST_WAIT_MS, 1000 * 2 ** (this.failures - 1))
                : Math.max(Math.min(took, LONGEST_REST_MS), 1000 / (hz || 1) - took);
            if (trouble !== this.trouble) {
                news = [trouble ? `${trouble}.` : "The server answers again.", ...news];
            }
            this.trouble = trouble;
            this.sentence = trouble && `${trouble}. Trying again in ${Math.round(wait / 1000)} s.`;
            this.show(news);
            if (hz > 0) {
                this.timer = setTimeout(() => this.wake(), wait);
            }
        }

        /** The text of the server's answer. */
        async fetchOnce() {
            const stop = new AbortController();
            const tooLate = setTimeout(() => stop.abort(), ANSWER_TIMEOUT_MS);
            try {
                const known = Array.from(this.layouts.keys()).join(",");
                const address = new URL(this.url, document.baseURI);
                if (known) {
                    address.searchParams.set("known", known);
                }
                const answer = await fetch(address, { cache: "no-store", signal: stop.signal });
                if (!answer.ok) {
                    throw problem(
                        [401, 403].includes(answer.status)
                            ? "The server asks for a login"
                            : `The server answers with error ${answer.status}`,
                    );
                }
                return await answer.text();
            } finally {
                clearTimeout(tooLate);
            }
        }

        /** Takes a snapshot from an answer; returns what is new in it for somebody who listens. */
        read(text) {
            if (text === this.text) {
                return [];
            }
            const before = this.snapshot;
            try {
                this.snapshot = this.unfold(JSON.parse(text));
                this.text = text;
            } catch (error) {
                this.layouts = new Map(); // The next answer is to be a whole one.
                this.text = null;
                if (this.failures === 0) {
                    console.error("QSwap:", error);
                }
                throw problem("The server's answer is not one of QSwap's");
            }
            try {
                return before ? qswap.words.news(before, this.snapshot) : [];
            } catch (error) {
                console.error("QSwap:", error);
                return [];
            }
        }

        /** Puts layers back together from their layout and what changes (routes.py explains the short form). */
        unfold(snapshot) {
            const seen = new Map();
            for (const model of snapshot.models || []) {
                if (model.changing) {
                    model.layers = qswap.words.unfoldLayers(this.layouts.get(model.layout), model.changing);
                }
                if (model.layout) {
                    seen.set(model.layout, model.layers);
                }
            }
            this.layouts = seen;
            return snapshot;
        }

        show(news) {
            const seen = Array.from(this.panels).filter((panel) => panel.seen);
            seen.forEach((panel) => panel.view.show(this.snapshot, this.sentence));
            seen.slice(0, 1).forEach((panel) => panel.view.say(news)); // Two would say it twice.
        }
    }

    /** One mount element: its view, its rate, and whether anybody can see it. */
    class Panel {
        constructor(mount, feed) {
            this.mount = mount;
            this.feed = feed;
            this.hz = Number(mount.dataset.hz) || 2;
            this.view = new qswap.View(mount);
            this.seen = false;
            this.observer = new IntersectionObserver((entries) => {
                this.seen = entries[entries.length - 1].isIntersecting;
                if (this.seen) {
                    this.view.show(feed.snapshot, feed.sentence);
                }
                feed.wake();
            });
            this.observer.observe(mount);
            feed.panels.add(this);
        }

        /** False once Gradio has replaced the mount element or what was drawn into it. */
        get intact() {
            return this.mount.isConnected && this.view.root.parentNode === this.mount;
        }

        remove() {
            this.observer.disconnect();
            this.view.remove();
            this.feed.panels.delete(this);
            this.feed.wake();
        }
    }

    const feeds = new Map(); // base address -> Feed
    const panels = new Map(); // mount element -> Panel

    /** Draws into mount elements that are new and forgets those that are gone. */
    function scan() {
        for (const [mount, panel] of panels) {
            if (!panel.intact) {
                panels.delete(mount);
                panel.remove();
            }
        }
        for (const mount of document.querySelectorAll(".qswap-panel")) {
            if (!panels.has(mount)) {
                const base = mount.dataset.base || "";
                if (!feeds.has(base)) {
                    feeds.set(base, new Feed(base));
                }
                panels.set(mount, new Panel(mount, feeds.get(base)));
            }
        }
    }

    let scanTimer = null;
    function scanSoon() {
        if (scanTimer === null) {
            scanTimer = setTimeout(() => {
                scanTimer = null;
                scan();
            }, SCAN_DELAY_MS);
        }
    }

    function start() {
        scan();
        new MutationObserver(scanSoon).observe(document.documentElement, { childList: true, subtree: true });
        document.addEventListener("visibilitychange", () => feeds.forEach((feed) => feed.wake()));
    }

    // Read twice (a page that loads the folder and embeds the text as well), it must not draw twice.
    if (!qswap.started) {
        qswap.started = true;
        if (document.readyState === "loading") {
            document.addEventListener("DOMContentLoaded", start);
        } else {
            setTimeout(start);
        }
    }
})();
