"""The page of the app, built with Gradio."""

import html
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import gradio as gr

from diffdiscover3d.app.jobs import DEMOS, JobOptions, make_demo, plain_message, run_job
from diffdiscover3d.app.sessions import JobStoppedError, Sessions
from diffdiscover3d.errors import OUT_OF_MEMORY, expected_errors, is_out_of_memory

logger = logging.getLogger("diffdiscover3d")

ALL_LEVELS = "all"
TITLE = "diffdiscover3d"
INTRODUCTION = """# Parts of a 3D volume, found without labels
Upload a volume or take a demo. The parts of every level are shown in a viewer; label maps on the volume's own grid can
be downloaded. Uploads and results are removed when this page is closed. Not a medical device."""
FORMATS = """NIfTI, NRRD, MetaImage, MGH, MINC, MRC, TIFF, HDF5 or NumPy; a header and its data together. All files of
a DICOM series, or a .zip of them; a .zip of a Zarr store."""
TRAINED_ON = {
    "synthetic-regular": "synthetic cells",
    "synthetic-irregular": "irregular synthetic cells",
    "brain-flair": "brain-extracted FLAIR",
}
EMPTY_VIEW = '<div class="empty-view">The parts will be shown here.</div>'
CSS = """
.gradio-container { max-width: 1500px !important; }
.report-frame { border: 0; display: block; height: 1150px; width: 100%; }
.hint p { color: var(--body-text-color-subdued) !important; font-size: var(--text-sm) !important; }
.empty-view { align-items: center; color: var(--body-text-color-subdued); display: flex; height: 420px;
  justify-content: center; }
"""


def make_theme() -> gr.Theme:
    """A theme with the fonts of the system, so that none is loaded."""
    system, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Default(primary_hue="teal", font=system, font_mono=mono)


def make_page(sessions: Sessions, models: Mapping[str, Sequence[int]], device: str, max_bytes: int) -> gr.Blocks:
    """Build the page.

    Args:
        sessions: where uploads and results are kept; Gradio must use its folder, too.
        models: the models to choose from, with their levels.
        device: of [`segment`].
        max_bytes: limit of an upload.

    Returns:
        The page, which can be launched.
    """
    first = next(iter(models))

    def hold(files, request: gr.Request) -> None:
        with _plain_errors(sessions.root):
            sessions.hold(_session(request), files or ())

    def stop_job(request: gr.Request) -> None:
        sessions.stop(_session(request))

    def end(request: gr.Request) -> None:
        sessions.end(_session(request))

    def begin(request: gr.Request):
        sessions.start(_session(request))
        return EMPTY_VIEW, "", None, None, gr.Tabs(selected="view")

    def find_parts(
        files,
        model,
        level,
        fast,
        volume,
        inner,
        voxel_size,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ):
        """Segment the uploaded volume.

        Returns:
            The report as HTML, notes, the table of parts, and the paths of all result files.
        """
        with _plain_errors(sessions.root):
            channel = None if volume is None else int(volume)
            options = JobOptions(model, level, fast, channel, (inner or "").strip(), (voxel_size or "").strip() or None)
            try:
                results = run_job(
                    sessions,
                    _session(request),
                    files or (),
                    options,
                    device=device,
                    max_bytes=max_bytes,
                    on_progress=lambda share, operation: progress(share, desc=operation),
                )
            except JobStoppedError:
                return EMPTY_VIEW, "Stopped.", None, None
        header, rows = results.parts
        summary = f"Done in {results.seconds:.1f} s."
        notes = "\n".join([summary, *(f"- {_plain_markdown(note)}" for note in results.notes)])
        table = {"headers": header, "data": rows}
        return frame(results.report), notes, table, [str(path) for path in results.files]

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                files = gr.File(
                    label="Volume",
                    file_count="multiple",
                    height=150,
                )
                _refuse_addresses(files)
                gr.Markdown(FORMATS, elem_classes="hint")
                with gr.Row():
                    demos = [gr.Button(label, size="sm", min_width=100) for label in DEMOS]
                model = gr.Dropdown(
                    list(models),
                    value=first,
                    label="Model",
                    info="; ".join(f"{name}: trained on {TRAINED_ON[name]}" for name in models if name in TRAINED_ON),
                )
                level = gr.Radio(_level_choices(models[first]), value=ALL_LEVELS, label="Level")
                with gr.Accordion("Options for unusual files", open=False):
                    fast = gr.Checkbox(label="At half the resolution (--fast)")
                    volume = gr.Number(
                        label="Channel or time point, from 0 (--volume)", precision=0, minimum=0, value=None
                    )
                    inner = gr.Textbox(
                        label="Name of the array in an HDF5, npz or Zarr file (behind ::)", max_length=500
                    )
                    voxel_size = gr.Textbox(
                        label="Voxel size, if the file has none (--voxel-size)",
                        placeholder="0.1,0.1,0.3um",
                        max_length=100,
                    )
                go = gr.Button("Find the parts", variant="primary")
                stop = gr.Button("Stop", size="sm")
            with gr.Column(scale=3, min_width=500):
                notes = gr.Markdown(elem_id="notes")
                with gr.Tabs() as tabs:
                    with gr.Tab("View", id="view"):
                        view = gr.HTML(EMPTY_VIEW, elem_id="view", padding=False)
                    with gr.Tab("Parts"):
                        table = gr.Dataframe(label="Parts", elem_id="parts", interactive=False, wrap=True, type="array")
                    with gr.Tab("Files"):
                        downloads = gr.File(label="Results", file_count="multiple", interactive=False)

        results = [view, notes, table, downloads]
        choices = [files, model, level, fast, volume, inner, voxel_size]
        hidden = {"queue": False, "api_visibility": "private"}
        files.change(hold, files, None, show_progress="hidden", **hidden)
        model.change(lambda name: gr.Radio(_level_choices(models[name]), value=ALL_LEVELS), model, level, **hidden)
        for button, (variant, name) in zip(demos, DEMOS.values(), strict=True):
            button.click(
                lambda variant=variant, name=name: (
                    [str(make_demo(sessions, variant))],
                    name if name in models else gr.skip(),
                ),
                None,
                [files, model],
                **hidden,
            )
        go.click(begin, None, [*results, tabs], show_progress="hidden", **hidden).then(
            find_parts,
            choices,
            results,
            api_name="find_parts",
            concurrency_limit=1,
            concurrency_id="segment",
            show_progress_on=view,
        )
        stop.click(stop_job, None, None, show_progress="hidden", **hidden)
        page.unload(end)
    return page


def frame(report: Path) -> str:
    """The report in a frame without access to the page around it."""
    page = html.escape(report.read_text(encoding="utf-8"))
    # the component fills templates in its value
    page = page.replace("{", "&#123;").replace("$", "&#36;").replace("`", "&#96;")
    return f'<iframe class="report-frame" title="Report" sandbox="allow-scripts" srcdoc="{page}"></iframe>'


@contextmanager
def _plain_errors(root: Path) -> Iterator[None]:
    """Within the context, errors become one plain line on the page; unexpected ones are logged with their traceback."""
    try:
        yield
    except expected_errors() as error:
        message = plain_message(error, root)
    except Exception as error:
        if is_out_of_memory(error):
            message = OUT_OF_MEMORY
        else:
            logger.exception("unexpected error of the app")
            message = "an unexpected error; the terminal in which the app was started shows it."
    else:
        return
    # the page would take it for HTML
    raise gr.Error(html.escape(message, quote=False), duration=None, print_exception=False)


def _refuse_addresses(files: gr.File) -> None:
    """Let a file component take uploads only: Gradio's would also fetch a file from an address."""
    move = files.async_move_resource_to_block_cache

    async def move_local(path: str | Path | None) -> str | None:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("files are not fetched from an address; upload them.", print_exception=False)
        return await move(path)

    files.async_move_resource_to_block_cache = move_local


def _level_choices(levels: Sequence[int]) -> list[tuple[str, str | int]]:
    """The choices of a level; a single network has one."""
    return [("all", ALL_LEVELS), *((str(level), level) for level in levels)]


def _session(request: gr.Request) -> str:
    """The identity of a page; a request without one is a session of its own."""
    return request.session_hash or uuid.uuid4().hex


def _plain_markdown(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\*_{}[]<>#" else c for c in text)
