"""The stand-alone host's page: plain Gradio around the panel."""

from __future__ import annotations

import html
import socket
import webbrowser
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from lib_qswap.panel.page import javascript, mount_html, stylesheet
from lib_qswap.panel.routes import add_routes
from lib_qswap.standalone.budget import Budget
from lib_qswap.standalone.denoise import preview
from lib_qswap.standalone.headless import report
from lib_qswap.standalone.host import Settings, StandaloneHost
from lib_qswap.standalone.worker import Status, Worker
from lib_qswap.swap.home import LOCATIONS, Location

if int(gr.__version__.partition(".")[0]) < 6:
    raise ImportError(f"Gradio {gr.__version__} is too old for this page", name="Gradio 6 or newer")

ADDRESS = "127.0.0.1"
TICK_S = 0.5
PREVIEW_PIXELS = 512
LOCATION_LABELS = {
    location: location.upper() if len(location) == 3 else location.title() for location in LOCATIONS
}


def serve(host: StandaloneHost, *, port: int, open_browser: bool, announce: Callable[[str], None]) -> None:
    """Shows the page until Ctrl-C, with a first generation under way.

    Args:
        announce: called with the page's address once it can be opened.

    Raises:
        OSError: the port is taken.
    """
    try:
        listener = socket.create_server((ADDRESS, port))
    except OSError as error:
        raise OSError(f"port {port}: {error.strerror}; choose another with --port") from None
    worker = Worker(host)
    server = uvicorn.Server(
        uvicorn.Config(make_app(host, worker), log_level="warning", timeout_graceful_shutdown=1)
    )
    worker.start(host.settings)
    # The listener queues whoever comes before the server runs.
    announce(f"http://{ADDRESS}:{port}/")
    if open_browser:
        webbrowser.open(f"http://{ADDRESS}:{port}/")
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        worker.stop()
        listener.close()


def make_app(host: StandaloneHost, worker: Worker) -> FastAPI:
    """The page at the root, and the panel's routes."""
    app = FastAPI()
    add_routes(app, host)
    return gr.mount_gradio_app(
        app,
        make_page(host, worker),
        path="/",
        head=f"<style>{stylesheet()}</style><script>{javascript()}</script>",
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        ssr_mode=False,
        footer_links=[],
    )


def make_page(host: StandaloneHost, worker: Worker) -> gr.Blocks:
    settings = host.settings

    def budget_percent(budget: Budget | None) -> int:
        return (
            100 if budget is None else min(100, round(100 * budget.of(host.packed_bytes) / host.packed_bytes))
        )

    def settings_of(location: Location, percent: float, steps: float, seed: float) -> Settings:
        now = host.settings
        budget = now.budget
        if percent != budget_percent(budget):
            budget = Budget(share=percent / 100) if percent < 100 else None
        return replace(now, location=location, budget=budget, steps=int(steps), seed=int(seed))

    def generate(location: Location, percent: float, steps: float, seed: float) -> str:
        if not worker.start(settings_of(location, percent, steps, seed)):
            gr.Warning("A generation is running: wait until it is done.")
        return progress_html(worker.status)

    def tick(shown: int) -> tuple[Any, ...]:
        status = worker.status
        if status.finished == shown or status.result is None:
            return progress_html(status), gr.skip(), gr.skip(), shown
        denoised, summary = status.result
        picture = preview(denoised.latent, scale=PREVIEW_PIXELS // denoised.latent.shape[-1]).numpy()
        return progress_html(status), picture, report(host.path, summary, host.snapshot()), status.finished

    with gr.Blocks(title="QSwap", analytics_enabled=False) as page:
        gr.Markdown(f"# QSwap\n{host.path.name} on {host.device}")
        with gr.Row():
            with gr.Column():
                location = gr.Dropdown(
                    [(LOCATION_LABELS[name], name) for name in LOCATIONS],
                    value=settings.location,
                    label="Swap location",
                )
                percent = gr.Slider(
                    0,
                    100,
                    budget_percent(settings.budget),
                    step=1,
                    label="Budget (% of the model; 100: no limit)",
                )
                with gr.Row():
                    steps = gr.Number(settings.steps, label="Steps", precision=0, minimum=1, maximum=100)
                    seed = gr.Number(settings.seed, label="Seed", precision=0)
                button = gr.Button("Generate", variant="primary")
                progress = gr.HTML(progress_html(worker.status))
            picture = gr.Image(
                label="Latent (principal components)",
                format="png",
                interactive=False,
                height=PREVIEW_PIXELS,
                buttons=["download", "fullscreen"],
            )
        gr.HTML(mount_html("qswap-panel"))
        with gr.Accordion("Residency after the last generation", open=False):
            table = gr.Code(language=None, interactive=False, show_label=False)
        shown = gr.State(0)
        button.click(generate, [location, percent, steps, seed], progress, queue=False)
        gr.Timer(TICK_S).tick(tick, shown, [progress, picture, table, shown], show_progress="hidden")
    return page


def progress_html(status: Status) -> str:
    return (
        f'<progress value="{status.share:.3f}" max="1" style="width: 100%"></progress>'
        f"<div>{html.escape(status.text)}</div>"
    )
