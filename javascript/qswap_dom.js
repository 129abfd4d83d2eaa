/**
 * Makes and changes elements, touching only what differs and putting text in as text.
 */
(function () {
    "use strict";

    const qswap = (window.qswap = window.qswap || {});
    const dom = (qswap.dom = qswap.dom || {});

    const SVG_NS = "http://www.w3.org/2000/svg";

    dom.element = function (tag, className, ...children) {
        const made = document.createElement(tag);
        made.className = className;
        made.append(...children);
        return made;
    };

    /** An element with one text node, and the function that changes it. */
    dom.label = function (tag, className, text = "") {
        const node = document.createTextNode(text);
        const made = dom.element(tag, className, node);
        made.setText = (next) => {
            if (node.data !== next) {
                node.data = next;
            }
        };
        return made;
    };

    dom.setAttribute = function (target, name, value) {
        if (target.getAttribute(name) !== value) {
            target.setAttribute(name, value);
        }
    };

    dom.show = function (target, visible) {
        if (target.hidden === visible) {
            target.hidden = !visible;
        }
    };

    dom.caret = function () {
        const svg = document.createElementNS(SVG_NS, "svg");
        svg.setAttribute("class", "qswap-caret");
        svg.setAttribute("viewBox", "0 0 10 10");
        svg.setAttribute("aria-hidden", "true");
        const path = document.createElementNS(SVG_NS, "path");
        path.setAttribute("d", "M3 1.5 L7 5 L3 8.5");
        svg.append(path);
        return svg;
    };
})();
