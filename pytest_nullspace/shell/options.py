"""Every option in one table; `declared` tells pytest of them, and `asked` reads what was given."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pytest_nullspace.settings import AUTO_MOST, DEFAULT_TEXT, PREFIX
from pytest_nullspace.shell import values


class Option(NamedTuple):
    """A row of the table: how an option is called, read and explained; ``more`` stands in docs/options.md alone.

    ``bare`` is the value of one that may stand without any, where it does. ``off`` is what the switch that turns it off
    is called, of one that is neither on nor off unless somebody says so. ``also`` is what other programs call it.
    """

    name: str
    metavar: str
    help: str
    read: Callable[[values.Given], Any]
    default: Any = None
    repeatable: bool = False
    switch: bool = False
    bare: str | None = None
    off: str = ""
    more: str = ""
    also: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """Its name in pytest's options and in ini files."""
        return "nullspace_" + self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return PREFIX + self.name


REQUIRE = Option(
    "require",
    "",
    "Refuse a run that gates nothing, because it names neither a model nor a saved run; fail one that is NOT GATED.",
    values.truth,
    default=False,
    switch=True,
    more="For CI, where a model that was forgotten, or tests that `-k` or `--deselect` leave out, would leave a green "
    "run. With it the exit code is 0 for SAFE and LOOK alone.",
)

OPTIONS = (
    Option(
        "model",
        "DIR",
        "Gate the adapter in DIR, or on the hub as owner/name[@revision]: one test per adapted layer.",
        values.model,
        repeatable=True,
        more="Without it, and without a saved run, the plugin does nothing.",
        also=("adapter", "lora", "peft", "checkpoint", "path", "dir"),
    ),
    Option(
        "stats",
        "JSON",
        "Gate the saved run in JSON, without its model and without torch.",
        values.path,
        repeatable=True,
        more="Alone, or beside a model.",
    ),
    REQUIRE,
    Option(
        "base",
        "DIR",
        "The base model of a PEFT adapter: a directory, a GGUF file or a hub id[@revision] (default: what its config "
        "names). A merged or fully trained model is held against it.",
        values.directory_or_id,
        more="A base saved in 8 or 4 bits needs its library, bitsandbytes or torchao, a GGUF file needs gguf. "
        "Of a LoRA-Null v1 or CorDA directory whose start is not there it tells the update since. "
        "See also [merged models](merged.md).",
        also=("base-model",),
    ),
    Option(
        "calib-dataset",
        "[NAME=]TEXT",
        "The text whose knowledge must survive: wikitext2, c4, ptb, triviaqa, nqopen, a .txt, .md, .jsonl, .json, .csv "
        "or .parquet file, a folder of texts or images or saved by datasets, hub:owner/name[:config[:split[:column]]], "
        "or self: what the base writes.",
        values.preserved,
        default=DEFAULT_TEXT,
        repeatable=True,
        more="Given more than once, each text but the first needs a name, such as `code=code.txt`, of letters, "
        "digits, '_', '.' and '-' (`self` is called so); a file whose own name has the equals sign wins over a name. "
        "A layer is judged by the text on which it is worst, so that nothing is green that is loud on one of ten; the "
        "predictions are judged text by text, in the tests `drift[NAME]`, the first of which holds the gain "
        "on the task too. Of a table `FILE:column` names the column, of a folder `DIR:split:column`. A part "
        "left empty is the default one. Rows with images go through the model's own processor; `FILE:image+caption` "
        "names both columns, `FILE:caption` reads the text alone. `self` is text that the base model, its adapter "
        "switched off, writes itself from the token that begins a text, at temperature 1, seeded by "
        "`--nullspace-seed`; it is kept in the user's cache folder by the base's digest and the settings, and the "
        "saved run names the file, which is a text that can be given elsewhere. Alone on the command line it stands "
        "beside the texts of the ini file, as `x=self` in their place. A file or folder of a name that stands "
        "for a text is given as `./self`.",
        also=("preserved", "text", "data", "dataset", "calibration"),
    ),
    Option(
        "task-dataset",
        "TEXT",
        "The text of what was learned, given like the text that must survive: the update is judged on it, and must be "
        "larger there.",
        lambda given: (values.text(given), given.folder),
        also=("task",),
    ),
    Option(
        "chat",
        "WHAT",
        "How conversations (columns messages, or prompt and completion) are read, by the tokenizer's chat template: "
        "auto where a table holds no text beside them, whole (or no value) in any case, assistant with the figures of "
        "what the assistant says alone, off not at all.",
        values.chat,
        default="auto",
        bare="whole",
        more="See [conversations](texts.md#conversations).",
    ),
    Option(
        "calib-size",
        "N",
        f"Windows to draw from each text; auto draws until every verdict is settled, {AUTO_MOST} at most, or auto:MOST "
        "(default 16).",
        values.calib_size,
        default=(16, AUTO_MOST),
        also=("windows", "samples", "nsamples"),
    ),
    Option(
        "seqlen",
        "N",
        "Tokens a window (default 2048, or what the model allows).",
        values.whole(1, 10_000_000),
        also=("max-length", "context"),
    ),
    Option(
        "max-activation-samples",
        "N",
        "Activation rows per layer at most, drawn evenly from all windows (default: all).",
        values.whole(1),
    ),
    Option("seed", "N", "Seed of the choice of windows and rows.", values.whole(0), default=42),
    Option(
        "batch-size",
        "N",
        "Windows per forward (default auto: as many as suit the device); a GPU that has no memory for so many is given "
        "half.",
        values.batch_size,
        more="On a CPU 256 tokens go together; a GPU begins with up to 16,384, and takes as many more as gain and fit.",
    ),
    Option("device", "DEVICE", "auto, cpu, cuda, cuda:N, xpu or xpu:N.", values.device, default="auto"),
    Option(
        "device-map",
        "MAP",
        "Spread a model that is larger than one device: auto over all cards, the CPU's memory and the disk, or what it "
        "may take of each, such as 0=20GiB,cpu=60GiB; or stream its blocks, as is done where it does not fit.",
        values.device_map,
        more="See [models larger than one device](larger.md).",
    ),
    Option(
        "dtype",
        "DTYPE",
        "auto (float32 on a CPU, elsewhere that in which the base is stored), float32, float16 or bfloat16.",
        values.one_of("auto", "float32", "float16", "bfloat16"),
        default="auto",
    ),
    Option("layers", "GLOB", "Gate only the layers whose names match GLOB.", values.text, default="*"),
    Option(
        "rank",
        "R",
        "Take the R leading right singular vectors of what changed for the down projections of a merged or fully "
        "trained model, which has none.",
        values.whole(1),
        default=0,
        more="Without it preservation and leakage are not measured of such a model. See [merged models](merged.md).",
    ),
    Option(
        "stage",
        "STAGE",
        "trained, or init for a checkpoint before training, whose update must still be zero.",
        values.one_of("trained", "init"),
        default="trained",
        more="At `init` effectiveness passes below 1e-6 and fails above 1e-4; contribution, forgetting and "
        "selectivity are not judged.",
    ),
    Option(
        "threshold",
        "[GLOB:]FIGURE:PASS:FAIL",
        "Judge FIGURE by other bounds, in the layers that match GLOB or on the text of that name; in ini one line GLOB "
        "FIGURE PASS FAIL.",
        values.override,
        repeatable=True,
        more="A bound is refused where its figure is not measured, or where its GLOB matches no layer, `model`, "
        "`drift` or, for a figure of the predictions, name of a text.",
    ),
    Option(
        "drift",
        "",
        "Demand the test `drift`, or leave it out: how far the predictions on the preserved text lie from the base "
        "model's, and how much the task text gained. By itself it is there where the model with its adapter switched "
        "off is the base.",
        values.auto_or_truth,
        switch=True,
        off="no-drift",
        more="In ini auto, true or false. Where it is demanded, the base is the checkpoint of "
        "`--nullspace-init=DIR`, else, for a checkpoint that carries its base, that of `--nullspace-base`, else the "
        "adapter switched off where that is the base, else, for a PEFT adapter that holds weights of the base itself "
        "(saved embeddings, biases), that base loaded once more. Where none can be had it is refused before the pass.",
    ),
    Option(
        "spectrum",
        "",
        "Report the least leakage that any subspace could have on the preserved text, and where the adapter stands.",
        values.truth,
        default=False,
        switch=True,
    ),
    Option(
        "suggest",
        "",
        "Where the predictions do not pass, look for the largest scale of the update that does, by some more forwards: "
        "lora_alpha 20 in place of 32.",
        values.truth,
        default=False,
        switch=True,
        more="With it goes `--nullspace-drift`. Of a LoRA-Null directory it is every `ALinear.weight` that is "
        "scaled. What starts with a part of W (PiSSA, CorDA, OLoRA, LoRA-Null v1) cannot be scaled so, which is said.",
    ),
    Option(
        "init",
        "DIR or JSON",
        "Hold every tensor against the checkpoint in DIR, from which training started, or norms and figures against "
        "its saved run in JSON.",
        values.path,
        more="Where that held a part of W (v1, CorDA, PiSSA, OLoRA), the update that is told is what changed since. "
        "With DIR a layer fails on what moved and must not have, and the test `frozen` on what moved "
        "outside the layers. With JSON, where the weights are not at hand or a saved run is gated, ‖B‖ "
        "and ‖W_res‖ must be what they were (to 1e-4), ‖A‖ must have left zero, ‖BX‖/‖X‖ may be at most 3 "
        "times as loud (or 0.01), and ‖ABX‖/‖X‖ must have gone from below 1e-6 to above 1e-4; the report "
        "shows every change. v1 and lora may move B.",
    ),
    Option(
        "variant",
        "VARIANT",
        "What training may move: v2 the up matrices alone, v1 and lora both; auto decides from the initial weights.",
        values.one_of("auto", "v1", "v2", "lora"),
        default="auto",
        more="Where the profile is `auto`, `lora` gives the profile `lora`, and the others `nullspace`.",
    ),
    Option(
        "profile",
        "PROFILE",
        "By what the adapter is judged: nullspace (its null space, what it forgets and learned), lora (what it forgets "
        "and learned), or reference (the reference script's three ratios); auto decides and says why.",
        values.one_of("auto", "reference", "nullspace", "lora"),
        default="auto",
        more="auto: a LoRA-Null directory promises a null space; a PEFT adapter does where its start, the rows of "
        "`lora_A` or the measured leakage say so, and none where its config names another initialisation. A figure for "
        "which `--nullspace-threshold` gives a bound decides in each profile.",
    ),
    Option(
        "compare",
        "JSON",
        "Hold each layer against an earlier run; {model} in the name stands for the run's.",
        values.path,
        more="Layers that are new or missing fail. The earlier file is never written. Where both read the very same "
        "windows the difference has a margin of its own, far smaller than two that are taken one by one: worse by "
        "0.004 ± 0.001. A run that an older version saved is compared without.",
    ),
    Option(
        "compare-fail",
        "FIGURE:LIMIT",
        "How much worse than in the earlier run FIGURE may be, as 5% of what it was or as a difference such as 0.001.",
        values.limit,
        repeatable=True,
    ),
    Option(
        "compare-allow",
        "WHAT",
        "Compare although WHAT differs: text, texts (all but the first), windows, seqlen, seed, rows, rank, widths, "
        "base, base-files, config, quantisation, base-loss, tokenizer, processor, class, libraries, task, chat, "
        "tokens, update, figures or unrecorded.",
        values.allowed,
        repeatable=True,
        more="It holds for a saved start of `--nullspace-init` as well. `unrecorded` allows what only one of "
        "the two runs tells. [Saved runs](saved-runs.md#one-run-against-another) has each of them.",
    ),
    Option(
        "weights-only",
        "",
        "Gate the weights alone, without text, forward or torch: norms, dead and non-finite layers, the rank used, and "
        "with --nullspace-init=DIR what moved. Activations are not measured, and every report says so.",
        values.truth,
        default=False,
        switch=True,
        more="Its saved run stands in for no measured one.",
    ),
    Option(
        "screen",
        "",
        "Screen several adapters of one base in one pass over it, to the first order: their leakage, preservation and "
        "forgetting. It gates nothing; gate the ones that you keep.",
        values.truth,
        default=False,
        switch=True,
        more="None of the adapters runs: each layer reads what the base gives it. The verdict of what nothing fails is "
        "NOT GATED, and what is saved stands in for no measured run. Adapters that are more than A and B beside an "
        "untouched base are refused. See [screening](screening.md).",
    ),
    Option(
        "save-stats",
        "JSON",
        "Save what was measured; {model} in the name stands for the directory's.",
        values.path,
        more="A superset of the reference script's file.",
        also=("json", "output", "save"),
    ),
    Option(
        "report",
        "FILE",
        "Write the report to FILE, by its suffix: .md Markdown, .html one page with charts, .prom OpenMetrics, .sarif "
        "for code scanning.",
        values.report,
        repeatable=True,
        more="The page needs no network, and no script to be read.",
        also=("html", "markdown", "md", "sarif"),
    ),
    Option(
        "card",
        "",
        "Write the result into the model card of each adapter, the README.md in its directory.",
        values.truth,
        default=False,
        switch=True,
        more="Its entry in the card's `model-index` and a section between two marks are renewed by each whole run; all "
        "else of the card stays byte for byte. A run that is NOT GATED writes nothing. See [the model card](card.md).",
    ),
    Option(
        "attest",
        "FILE",
        "Write an unsigned in-toto statement to FILE: the SHA-256 of each file of the adapter and its base, the tests, "
        "bounds and figures.",
        values.path,
        more="Written by a whole run alone, also by a failed one. `python -m pytest_nullspace attest-verify FILE DIR` "
        "holds files against it. See [statements](attest.md).",
    ),
    Option(
        "allow-unreached",
        "GLOB",
        "Let layers that match GLOB pass with a warning where no activation row reached them, as experts may.",
        values.text,
        repeatable=True,
        more="They are left out of the averages; their weights are held all the same.",
    ),
    Option(
        "serve",
        "SERVER[==VERSION]",
        "Add the test `serve[SERVER]`: would vllm, sglang, tgi, llama.cpp or peft take the adapter and find all of it? "
        "Several are named as vllm,sglang.",
        values.servers,
        repeatable=True,
        more="By headers and configs alone; no server is needed, and none is asked. What the server would refuse, "
        "leave out or scale otherwise fails, what nobody knows warns. The server's own settings may stand behind it: "
        "`--nullspace-serve='vllm==0.17 --max-lora-rank 64 --lora-target-modules qkv_proj'`. See "
        "[what servers take](serving.md).",
    ),
    Option(
        "merge",
        "TYPE[,TYPE]",
        "Add the test `merge[TYPE]`: does a merge in bf16, fp16, fp8 or nf4 keep the update of every layer, or round "
        "it away?",
        values.merged,
        repeatable=True,
        more="From the weights alone, also with `--nullspace-weights-only`; where a text is measured it is told of its "
        "activations too. See [merging](merging.md).",
    ),
    Option(
        "strict-scope",
        "",
        "Add the test `scope`, which fails where a PEFT adapter trained tensors that no layer test covers.",
        values.truth,
        default=False,
        switch=True,
    ),
)
