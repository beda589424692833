"""The whole method over one run folder: :class:`Run` for configured runs, :class:`PrivImage` for Python."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from privimage_fast import report
from privimage_fast.config import ConfigError, DataConfig, RunConfig, build_config, differing_keys, load_yaml
from privimage_fast.data import ImageSet, holdout_split, join, open_image_set
from privimage_fast.data.atomic import atomic_write_text
from privimage_fast.dp.accounting import (
    ADJACENCY,
    UNIT,
    DPSGDEvent,
    GaussianEvent,
    default_delta,
    epsilon,
    solve_noise_multiplier,
)
from privimage_fast.dp.engine import accumulate_clipped
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.planner import Plan as StepPlan
from privimage_fast.dp.sampling import OSRandom, SeededRandom
from privimage_fast.models.edm import Denoiser, EDMConfig
from privimage_fast.models.gan import GANConfig, Generator
from privimage_fast.models.replay import forget
from privimage_fast.models.training import Drawable, ImageModel
from privimage_fast.models.unet import UNetConfig
from privimage_fast.stages.agreement import check_text, question, stand_in_tables
from privimage_fast.stages.clusters import public_clusters
from privimage_fast.stages.evaluate import run_evaluate
from privimage_fast.stages.finetune import budget_record, plan_finetune, run_finetune
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, timed
from privimage_fast.stages.pretrain import run_pretrain
from privimage_fast.stages.query import SemanticFunction, public_classifier, run_query, semantic_function_of
from privimage_fast.stages.sample import draw, run_sample, save_sheet
from privimage_fast.stages.select import labels_per_class, run_select, selected_subset

logger = logging.getLogger(__name__)

# Keys that may change when a run folder is opened again: nothing that was trained or charged depends on them.
_REOPENABLE = ("out", "device", "precision", "sample.", "evaluate.")


@dataclass(frozen=True)
class Plan:
    """What a run will cost, from public numbers and a timed step on random images."""

    epsilon: float
    delta: float
    population: int
    sample_rate: float
    steps: int
    noise_multiplier: float
    query_noise_multiplier: float | None
    epsilon_without_query: float
    labels_per_class: int
    selection: str  # what is chosen of the public set, in words
    parameters: int
    private_parameters: int  # trained on sensitive images
    step: StepPlan
    pretrain_seconds: float
    finetune_seconds: float
    sample_seconds: float

    def table(self) -> str:
        """The plan as aligned lines of text."""
        query = f"σ₁ = {self.query_noise_multiplier:.4g}" if self.query_noise_multiplier is not None else "none"
        total = self.pretrain_seconds + self.finetune_seconds + self.sample_seconds
        rows = [
            ("budget", f"ε = {self.epsilon:g}, δ = {self.delta:.3g}, N = {self.population} (public)"),
            ("query", f"{query}; without the query the same σ would cost ε = {self.epsilon_without_query:.3f}"),
            ("selection", self.selection),
            ("DP-SGD", f"σ = {self.noise_multiplier:.4f}, q = {self.sample_rate:.4g}, {self.steps} steps" if self.steps
             else "none: trained on public images only"),
            ("network", f"{self.parameters:,} parameters" + ("" if self.private_parameters == self.parameters else
                        f", {self.private_parameters:,} of them (the discriminator) trained by DP-SGD")),
            ("micro-batch", f"{self.step.physical_batch_size} images, up to {self.step.peak_bytes / 2**20:.0f} MiB to fine-tune"),
            ("rough time", f"{_minutes(total)}: pre-train {_minutes(self.pretrain_seconds)}, fine-tune "
                           f"{_minutes(self.finetune_seconds)}, sample {_minutes(self.sample_seconds)} (classifiers apart)"),
        ]  # fmt: skip
        return "\n".join(f"{name:<12} {value}" for name, value in rows)


class Run:
    """One run folder, its configuration and its data.

    Args:
        config: as given; `self.config` is the resolved one once the folder is open.
        public, private, test: image sets in place of the configured sources.
        semantic_function: scores of public labels in place of the configured classifier.
    """

    def __init__(
        self, config: RunConfig, *, public: ImageSet | None = None, private: ImageSet | None = None,
        test: ImageSet | None = None, semantic_function: SemanticFunction | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.folder = RunFolder(config.out)
        self._given = {"public": public, "private": private, "test": test}
        self._semantic_function = semantic_function
        self.device = _device(config.device)
        self.autocast = _autocast(config.precision, self.device)

    # ---- data

    @property
    def _public_seed(self) -> int:
        return self.config.seed if self.config.public_seed is None else self.config.public_seed

    def _open(self, name: str, source: str | None = None) -> ImageSet:
        given = self._given[name]
        data = self.config.data
        if given is not None:
            if (given.resolution, given.channels) != (data.resolution, data.channels):
                return given.with_resolution(data.resolution, data.channels)
            return given
        return self.open_source(data, name, source)

    @staticmethod
    def open_source(data: DataConfig, name: str, source: str | None = None) -> ImageSet:
        """The set that ``data`` names "public", "private" or "test", or another source in its place, in the size it asks for."""
        source = source or getattr(data, name)
        if not source:
            raise ConfigError(f"data.{name} is not set; give a folder, a file or embedded:NAME")
        sets = [
            open_image_set(s, resolution=data.resolution, channels=data.channels, format=data.format, skip_bad=data.skip_bad)
            for s in ([source] if isinstance(source, str) else source)
        ]
        images = join(sets) if len(sets) > 1 else sets[0]
        for skipped in images.skipped:
            logger.warning("skipped %s: %s", skipped.path, skipped.reason)
        return images

    @cached_property
    def public(self) -> ImageSet:
        return self._open("public")

    @cached_property
    def asked(self) -> ImageSet:
        """The public set by the labels that the query asks for: its own, or clusters."""
        return self._label_space(self.folder)[0]

    def _label_space(self, folder: RunFolder) -> tuple[ImageSet, SemanticFunction | None]:
        """That set, and the function that scores its labels where it is not the classifier of the public set's own.

        Raises:
            ConfigError: both clusters and a function of the user's.
            RunError: fewer labels than the classes are to have.
        """
        c = self.config
        if c.query.clusters is None or c.select.mode != "semantic":
            return self.public, self._semantic_function
        if self._semantic_function is not None:
            raise ConfigError(
                "query.clusters is set and a semantic function given; leave it null (pf.cluster_labels clusters any embedding)"
            )
        found = public_clusters(folder, c.query, self.public, seed=self._public_seed, device=self.device)
        labels_per_class(c.select, n_labels=found[0].n_classes, n_classes=self.private.n_classes)
        return found

    @cached_property
    def _private_and_test(self) -> tuple[ImageSet, ImageSet | None]:
        data = self.config.data
        private = self._open("private")
        if self._given["test"] is not None or data.test:
            return private, self._open("test")
        if data.holdout:
            return holdout_split(private, data.holdout, self.config.seed)
        return private, None

    @property
    def private(self) -> ImageSet:
        """The sensitive images that are trained on."""
        return self._private_and_test[0]

    @property
    def test(self) -> ImageSet | None:
        return self._private_and_test[1]

    # ---- opening

    def check_inputs(self) -> None:
        """Finds out before anything is spent what would stop a later stage.

        Raises:
            ConfigError: a test set of other classes, or an ONNX classifier that is not there.
        """
        test, private = self.test, self.private
        if test is not None and test.label_names != private.label_names:
            odd = sorted(set(test.label_names) ^ set(private.label_names))
            raise ConfigError(
                f"data.test has other classes than data.private: {', '.join(odd) or 'the same names in another order'}; the test "
                "set needs the same class folders (or label_names)"
            )
        if self.config.query.onnx and not Path(self.config.query.onnx).is_file():
            raise ConfigError(f"query.onnx: no file {self.config.query.onnx}")
        if self.config.evaluate.inception and not Path(self.config.evaluate.inception).is_file():
            raise ConfigError(f"evaluate.inception: no file {self.config.evaluate.inception}")

    def check_new(self, *, resume: bool) -> None:
        """Refuses a folder that holds a run, unless it is to be gone on with, and a path that is no folder."""
        if self.folder.path.exists() and not self.folder.path.is_dir():
            raise RunError(f"{self.folder.path} is a file, but a run needs a folder; choose another --out")
        if self.folder.config.exists() and not resume:
            raise RunError(
                f"{self.folder.path} already holds a run; go on with --resume (in Python resume=True), or choose another --out"
            )

    @contextmanager
    def opened(self, *, resume: bool) -> Iterator[Run]:
        """Locks the folder, resolves the configuration against what is there, and saves it.

        Raises:
            RunError: the folder holds a run and ``resume`` is off, or holds one with other settings.
        """
        self.check_new(resume=resume)
        with self.folder.locked():
            saved = load_config(self.folder.config) if self.folder.config.exists() else None
            self.config = self._resolved(saved)
            if saved is not None:
                changed = [k for k in differing_keys(saved, self.config) if not k.startswith(_REOPENABLE)]
                if changed:
                    raise RunError(
                        f"{self.folder.path} was started with other settings ({', '.join(changed)}); "
                        "restore them, or choose another --out"
                    )
            self._check_ledger()
            self.check_inputs()
            atomic_write_text(self.folder.config, self.config.to_yaml())
            try:
                yield self
            finally:
                self.__dict__.pop("noise_key", None)  # an interrupted step's place in the noise must not be met again
                if "ledger" in self.__dict__:
                    self.__dict__.pop("ledger").close()

    def _check_ledger(self) -> None:
        """What the folder holds of the sensitive images must be in its ledger: a lost ledger would read as ε = 0.

        Raises:
            RunError: naming the file that has no charge.
        """
        folder = self.folder
        records = Ledger.read(folder.ledger).records() if folder.ledger.exists() else []
        advice = f"Restore {folder.ledger}, or start over with another --out: nothing can be said about ε without it"
        if folder.query.exists():
            sigma = folder.read_json(folder.query, "query")["noise_multiplier"]
            if not any(r.stage == "query" and r.event == GaussianEvent(sigma) for r in records):
                raise RunError(f"{folder.query} holds a query with σ₁ = {sigma:g} that the ledger does not charge. {advice}")
        charged = sum(r.event.steps for r in records if r.stage == "finetune" and isinstance(r.event, DPSGDEvent))
        for name in ("finetune", "finetune-progress"):
            path = folder.checkpoint(name)
            if path.exists():
                tensors, metadata = folder.load_tensors(path, "finetune")
                taken = int(tensors["steps"]) if name == "finetune-progress" else int(metadata["steps"])
                if taken > charged:
                    raise RunError(f"{path} has taken {taken} steps, the ledger charges {charged}. {advice}")

    def _resolved(self, saved: RunConfig | None) -> RunConfig:
        """Fills every null from the saved run, or from the data, so that the saved configuration says what was done."""
        c = self.config
        filled = saved or c
        population = c.privacy.population or filled.privacy.population or len(self.private)
        delta = c.privacy.delta or filled.privacy.delta or default_delta(population)
        each = c.select.labels_per_class or filled.select.labels_per_class
        if each is None or (saved is None and c.select.mode in ("semantic", "random")):
            each = labels_per_class(c.select, n_labels=self._n_labels, n_classes=self.private.n_classes)
        query_noise = filled.query.noise_multiplier if c.query.noise_multiplier is None else c.query.noise_multiplier
        if query_noise is None:
            query_noise = query_noise_multiplier(c.privacy.epsilon, delta, c.query.share)
        steps = c.finetune.steps or filled.finetune.steps or c.finetune.total_steps(population)
        multiplicity = c.finetune.multiplicity or filled.finetune.multiplicity or c.model.default_multiplicity
        return replace(
            c,
            privacy=replace(c.privacy, population=population, delta=delta),
            query=replace(c.query, noise_multiplier=query_noise, votes_per_image=c.query.votes_per_image or each),
            select=replace(c.select, labels_per_class=each),
            finetune=replace(c.finetune, steps=steps, multiplicity=multiplicity),
        )

    @property
    def _n_labels(self) -> int:
        """As asked for; a few clusters may turn out empty."""
        return self.config.query.clusters or self.public.n_classes

    @cached_property
    def ledger(self) -> Ledger:
        """Open for writing while the folder is; closed with it."""
        privacy = self.config.privacy
        assert privacy.delta is not None and privacy.population is not None
        return Ledger(
            self.folder.ledger, target_epsilon=privacy.epsilon if math.isfinite(privacy.epsilon) else None,
            delta=privacy.delta, population=privacy.population, seeded=not privacy.secure,
        )  # fmt: skip

    def spent(self) -> dict[str, Any]:
        """ε composed from the ledger file, and what it refers to."""
        ledger = Ledger.read(self.folder.ledger)
        return {
            "epsilon": _json_number(ledger.epsilon()), "delta": self.config.privacy.delta, "adjacency": ADJACENCY, "unit": UNIT,
            "accountant": "PLD (pessimistic)", "secure": not ledger.seeded,
        }  # fmt: skip

    @cached_property
    def noise_key(self) -> NoiseKey:
        return NoiseKey.from_os() if self.config.privacy.secure else NoiseKey.from_seed(self.config.seed)

    # ---- stages

    def model(self) -> ImageModel:
        """The networks with their initial weights."""
        c = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._public_seed)
            return c.model.build(
                resolution=c.data.resolution, channels=c.data.channels, num_classes=self.private.n_classes
            )  # fmt: skip

    def query(self) -> dict[str, Any] | None:
        """Only a semantic selection asks; every other mode spends nothing."""
        c = self.config
        if c.select.mode != "semantic":
            return None
        assert c.query.votes_per_image is not None and c.query.noise_multiplier is not None
        asked, function = self._label_space(self.folder)
        query = run_query(
            self.folder, c.query, public=asked, private=self.private, votes_per_image=c.query.votes_per_image,
            noise_multiplier=c.query.noise_multiplier, ledger=self.ledger, noise_key=self.noise_key, seed=self._public_seed,
            device=self.device, semantic_function=function,
        )  # fmt: skip
        if math.isfinite(c.privacy.epsilon) and not self.folder.query_check.exists():
            self.folder.write_json(self.folder.query_check, self._question(self.folder, query))
        return query

    def question(self) -> str:
        """How the choice of labels would fare under noise, on public stand-ins for the sensitive classes; spends nothing."""
        c = self._resolved(None)
        if c.select.mode != "semantic" or not math.isfinite(c.privacy.epsilon):
            raise ConfigError("only a semantic selection at a finite ε asks a noisy query; set select.mode and privacy.epsilon")
        self.config = c
        with tempfile.TemporaryDirectory() as place:  # the classifier of a run that is not begun is kept nowhere
            folder = self.folder if self.folder.config.exists() else RunFolder(place)
            query = folder.read_json(folder.query, "query") if folder.query.exists() else None
            if folder is not self.folder:
                folder.create()
            return check_text(self._question(folder, query))

    def _question(self, folder: RunFolder, query: dict[str, Any] | None) -> dict[str, Any]:
        c = self.config
        each, votes, population = c.select.labels_per_class, c.query.votes_per_image, c.privacy.population
        assert each and votes and population and c.privacy.delta
        epsilon, delta = c.privacy.epsilon, c.privacy.delta
        asked, given = self._label_space(folder)
        function, _ = semantic_function_of(folder, c.query, public=asked, seed=self._public_seed, device=self.device, given=given)
        stand_ins = stand_in_tables(
            function, self.public, asked, n_classes=self.private.n_classes, population=population, votes_per_image=votes,
            seed=self._public_seed, device=self.device,
        )  # fmt: skip
        by_share = math.isclose(c.query.noise_multiplier or 0.0, query_noise_multiplier(epsilon, delta, c.query.share))
        return question(
            lambda share: query_noise_multiplier(epsilon, delta, share), k=each, votes_per_image=votes, population=population,
            assignment=c.select.assignment, stand_ins=stand_ins, query=query, share=c.query.share if by_share else None,
        )  # fmt: skip

    def select(self) -> dict[str, Any]:
        c = self.config
        assert c.select.labels_per_class is not None
        query = self.folder.read_json(self.folder.query, "query") if c.select.mode == "semantic" else None
        return run_select(
            self.folder, c.select, public=self.asked, class_names=self.private.label_names, query=query,
            labels_each=c.select.labels_per_class, seed=c.seed, n_labels=self._n_labels,
        )  # fmt: skip

    def pretrain(self) -> ImageModel:
        c, model = self.config, self.model()
        selection = self.folder.read_json(self.folder.selection, "select")
        indices, labels = selected_subset(selection, self.asked, self.private.label_names)
        run_pretrain(
            self.folder, c.pretrain, model=model, public=self.public, indices=indices, labels=labels, seed=self._public_seed,
            device=self.device, autocast=self.autocast,
        )  # fmt: skip
        if not (self.folder.samples / "before.png").exists():
            self._sheets_before(model.drawable, indices, labels)
        return model

    def _sheets_before(self, model: Drawable, indices: np.ndarray, labels: np.ndarray) -> None:
        """What the model draws, and what it was shown, before it has seen a sensitive image."""
        names = self.private.label_names
        wanted = np.repeat(np.arange(min(20, len(names))), 12)
        before = draw(
            model, wanted, self.config.sample.sampler, seed=self.config.seed, device=self.device, autocast=self.autocast
        )
        forget(model)  # fine-tuning moves the weights, and needs the memory
        save_sheet(self.folder, "before", ImageSet(before, wanted, names, name="before"))
        if len(indices) and labels.max() < len(names):
            order = np.random.default_rng(self.config.seed).permutation(len(indices))
            chosen = ImageSet(self.public.images[indices[order]], labels[order], names, name="public")
            save_sheet(self.folder, "public", chosen)

    def finetune(self) -> ImageModel:
        c, model = self.config, self.model()
        model.load_state_dict(self.folder.load_tensors(self.folder.checkpoint("pretrain"), "pretrain")[0])
        assert c.privacy.population is not None and c.privacy.delta is not None
        if not c.privacy.train:
            self._keep_public(model)
            return model
        run_finetune(
            self.folder, c.finetune, model=model, private=self.private, population=c.privacy.population,
            target_epsilon=c.privacy.epsilon, delta=c.privacy.delta, ledger=self.ledger, noise_key=self.noise_key,
            randomness=OSRandom() if c.privacy.secure else SeededRandom(c.seed), seed=c.seed, device=self.device,
            autocast=self.autocast,
        )  # fmt: skip
        save_pretrained(model.drawable, self.folder.model, class_names=self.private.label_names, run=self)
        return model

    def _keep_public(self, model: ImageModel) -> None:
        """In place of fine-tuning, for the baseline that never trains on sensitive images: no step, no charge."""
        c = self.config
        with timed(self.folder, "finetune", fingerprint("public only", c.model, c.pretrain)):
            population, delta = self.ledger.header.population, self.ledger.header.delta
            record = budget_record(c.finetune, population, c.privacy.epsilon, delta, 0.0, 0, self.ledger)
            self.folder.write_json(self.folder.budget, record)
            save_pretrained(model.drawable, self.folder.model, class_names=self.private.label_names, run=self)

    def sample(self) -> ImageSet:
        if not self.folder.model.exists():
            raise RunError(f"{self.folder.model} is missing; run `privimage finetune` first")
        model, names, weights = load_pretrained(self.folder.model)
        return run_sample(
            self.folder, self.config.sample, model=model, class_names=names, weights=weights, seed=self.config.seed,
            device=self.device, autocast=self.autocast,
        )  # fmt: skip

    def evaluate(self) -> dict[str, Any] | None:
        """Against the test set, where there is one."""
        if self.test is None:
            return None
        c = self.config
        network = public_classifier(self.folder, c.query.classifier, self.public, seed=self._public_seed, device=self.device)
        return run_evaluate(
            self.folder, c.evaluate, synthetic=self.sample(), test=self.test, feature_network=network,
            weights=load_pretrained(self.folder.model)[2], seed=c.seed, device=self.device,
            private=self.private if c.evaluate.neighbours or c.evaluate.memorisation else None,
        )  # fmt: skip

    def report(self) -> Path:
        report.build_card(self.folder.path)
        return report.build_report(self.folder.path)

    def all(self) -> Path:
        """Every stage in order; those that are done already return at once."""
        for stage in (self.query, self.select, self.pretrain, self.finetune, self.sample, self.evaluate):
            logger.info("%s", stage.__name__)
            stage()
        return self.report()

    # ---- planning

    def plan(self) -> Plan:
        """Needs the sizes of both sets, and spends nothing."""
        self.check_inputs()
        c = self._resolved(None)
        assert c.privacy.population and c.privacy.delta and c.finetune.steps and c.select.labels_per_class
        rate = c.finetune.sample_rate(c.privacy.population)
        queried = c.select.mode == "semantic"
        prior = [GaussianEvent(c.query.noise_multiplier)] if queried and c.query.noise_multiplier is not None else []
        sigma, steps = 0.0, c.finetune.steps if c.privacy.train else 0
        if math.isfinite(c.privacy.epsilon) and steps:
            sigma = solve_noise_multiplier(
                target_epsilon=c.privacy.epsilon, delta=c.privacy.delta, sample_rate=rate, steps=steps,
                prior_events=prior,
            )  # fmt: skip
        model = self.model().to(self.device)
        step = plan_finetune(model, c.finetune)
        networks = (model, c.finetune.training(model).module)
        parameters, private_parameters = (sum(p.numel() for p in network.parameters()) for network in networks)
        # The last micro-batch is padded to its fixed shape: half of one, on average.
        images_a_step = c.finetune.batch_size + step.physical_batch_size / 2
        seconds = _step_seconds(model, c, self.device)
        images = c.sample.per_class * self.private.n_classes
        return Plan(
            epsilon=c.privacy.epsilon, delta=c.privacy.delta, population=c.privacy.population, sample_rate=rate,
            steps=steps, noise_multiplier=sigma,
            query_noise_multiplier=c.query.noise_multiplier if queried else None,
            epsilon_without_query=epsilon([DPSGDEvent(sigma, rate, steps)] if steps else [], c.privacy.delta),
            labels_per_class=c.select.labels_per_class,
            selection=_selection_text(c, n_labels=self._n_labels, n_classes=self.private.n_classes),
            parameters=parameters, private_parameters=private_parameters, step=step,
            pretrain_seconds=0.0 if c.select.mode == "none" else seconds.public * c.pretrain.batch_size * c.pretrain.steps,
            finetune_seconds=(seconds.private * images_a_step + seconds.after_step) * steps,
            sample_seconds=seconds.draw * images,
        )  # fmt: skip

    def write_plan(self, plan: Plan) -> None:
        """budget.json as planned; fine-tuning replaces it by what it uses."""
        c = self.config
        record = budget_record(
            c.finetune, plan.population, plan.epsilon, plan.delta, plan.noise_multiplier, plan.steps,
            query_noise_multiplier=plan.query_noise_multiplier,
        )  # fmt: skip
        self.folder.write_json(self.folder.budget, record)


@dataclass(frozen=True)
class _Seconds:
    """An image's share of drawing, of a public and of a private step, and what a private step takes beside its images."""

    draw: float
    public: float
    private: float
    after_step: float


def _step_seconds(model: ImageModel, config: RunConfig, device: str, rows: int = 64) -> _Seconds:
    """Times each part on random images (best of two). Changes the model's weights."""
    private = config.finetune.training(model)
    public = model.public_training(
        lr=1e-6, ema_decay=config.pretrain.ema_decay, label_dropout=config.pretrain.label_dropout
    )  # fmt: skip
    count = max(1, rows // private.rows)
    random = torch.Generator().manual_seed(0)
    images = torch.rand((count, model.channels, model.resolution, model.resolution), generator=random) * 2 - 1
    labels = torch.zeros(count, dtype=torch.int64)
    # One step of a sampler tells what all of them take.
    sampler = replace(config.sample.sampler, steps=2)
    passes = [model.drawable.network_evaluations(options) for options in (config.sample.sampler, sampler)]
    sums = {name: torch.zeros_like(p) for name, p in private.module.named_parameters()}

    def draw() -> None:
        noise = torch.randn(count, *model.drawable.latent_shape, generator=random)
        model.drawable.draw(labels.to(device), sampler, noise.to(device)).sum().item()

    def public_step() -> None:
        on_device = (images.to(device), labels.to(device))
        public.step(*on_device, random if device == "cpu" else torch.Generator(device), 1e-6).item()

    def private_step() -> None:
        args = [t.to(device) for t in private.batch(images, labels, random)]
        accumulate_clipped(private.module, private.loss, args, sums, max_grad_norm=1.0, multiplicity=private.rows)[0].sum().item()

    def after_steps() -> None:
        for step in range(private.round):
            private.after_step(step, 0)

    return _Seconds(
        _best_of_two(draw) / count * passes[0] / passes[1], _best_of_two(public_step) / count,
        _best_of_two(private_step) / count, _best_of_two(after_steps) / private.round,
    )  # fmt: skip


def _best_of_two(work: Callable[[], None]) -> float:
    times = []
    for _ in range(3):  # the first warms up
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _selection_text(c: RunConfig, *, n_labels: int, n_classes: int) -> str:
    """What the plan says of the selection; above all where it has nothing to leave out."""
    mode, each, ratio = c.select.mode, c.select.labels_per_class, c.select.max_image_ratio
    assert each is not None
    if mode == "none":
        return "none: nothing is pre-trained on public images"
    capped = "" if ratio is None else f", at most {100 * ratio:g} % of the images"
    if mode == "all":
        return f"none: all public images{capped}, without their labels"
    what = "cluster" if c.query.clusters else "public label"
    labels = f"{each} {what}{'s' if each > 1 else ''} a class"
    if mode == "random":
        return f"as many public images as {labels} would bring{capped}, drawn blindly"
    if each * n_classes < n_labels:
        return f"{labels}, {each * n_classes} of {n_labels}{capped}"
    advice = "more clusters" if c.query.clusters else "query.clusters, or a public set with more labels"
    return (
        f"{labels}, which is all {n_labels} of them{capped}: no {what} is left out, and the query only buys which class takes "
        f"which; to select, take {'fewer labels_per_class, ' if each > 1 else ''}{advice}"
    )


def query_noise_multiplier(target_epsilon: float, delta: float, share: float) -> float:
    """σ₁ such that the query takes ``share`` of μ², where μ-GDP (Dong et al. 2022, corollary 1) is what (ε, δ) allows."""
    if math.isinf(target_epsilon):
        return 0.0

    def excess(mu: float) -> float:
        left, right = norm.logcdf(-target_epsilon / mu + mu / 2), target_epsilon + norm.logcdf(-target_epsilon / mu - mu / 2)
        return math.exp(left) - math.exp(right) - delta

    mu = brentq(excess, 1e-4, 10 + 2 * math.sqrt(2 * target_epsilon) + target_epsilon)
    return 1 / (mu * math.sqrt(share))


def load_config(path: Path) -> RunConfig:
    return build_config(load_yaml(path.read_text(), str(path)))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise ConfigError(f"device must be auto, cpu or cuda, found {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device; use --device cpu, or see `privimage doctor`")
    return name


def _autocast(precision: str, device: str) -> torch.dtype | None:
    """What networks may compute in beside float32."""
    low = precision == "bfloat16" or (precision == "auto" and torch.device(device).type == "cuda")
    return torch.bfloat16 if low else None


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------- saved models


def save_pretrained(model: Drawable, path: str | Path, *, class_names: tuple[str, ...], run: Run | None = None) -> None:
    """Writes model.safetensors and config.json (and, of a run, its ledger) to a folder."""
    folder = RunFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.save_tensors(folder.path / "model.safetensors", model.state_dict(), {})
    described: dict[str, Any] = {
        "format": 1, **model.describe(), "resolution": model.resolution, "channels": model.channels,
        "class_names": list(class_names),
    }  # fmt: skip
    if run is not None:
        described["privacy"] = run.spent()
        described["sampler"] = asdict(run.config.sample.sampler)
        atomic_write_text(folder.ledger, run.folder.ledger.read_text())
    folder.write_json(folder.path / "config.json", described)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def load_pretrained(path: str | Path) -> tuple[Drawable, tuple[str, ...], str]:
    """(model, class names, fingerprint of the weights) of a folder written by :func:`save_pretrained`."""
    folder = RunFolder(path)
    described = folder.read_json(folder.path / "config.json", "finetune")
    try:
        if described["format"] != 1:
            raise ValueError(f"format {described['format']}, expected 1")
        names = tuple(str(name) for name in described["class_names"])
        shape = {name: int(described[name]) for name in ("resolution", "channels")} | {"num_classes": len(names)}
        family = described.get("family", "diffusion")
        if family == "gan":
            model: Drawable = Generator(GANConfig(**described["gan"]), **shape)
        elif family == "diffusion":
            model = Denoiser(UNetConfig(**described["unet"]), EDMConfig(**described["edm"]), **shape)
        else:
            raise ValueError(f"family {family!r}, expected diffusion or gan")
        tensors, _ = folder.load_tensors(folder.path / "model.safetensors", "finetune")
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{folder.path} does not hold a model of this version: {error}") from error
    return model.eval(), names, fingerprint([(n, t.numpy().tobytes()) for n, t in sorted(tensors.items())])


class PrivImage:
    """The method in Python.

    Args:
        config: a :class:`RunConfig`, or None for the defaults.
        sections: whole sections or single values over it, e.g. ``PrivImage(privacy={"epsilon": 3}, model={"preset": "small"})``.

    Example:
        >>> model = pf.PrivImage(privacy={"epsilon": 10})                             # doctest: +SKIP
        >>> print(model.plan("public/", "sensitive/").table())                        # doctest: +SKIP
        >>> model.fit("public/", "sensitive/", out="runs/a")                          # doctest: +SKIP
        >>> images = model.sample(100)                                                # doctest: +SKIP
    """

    def __init__(self, config: RunConfig | None = None, **sections: Any) -> None:
        self.config = build_config(sections, config)
        self._run: Run | None = None
        self._model: Drawable | None = None
        self._class_names: tuple[str, ...] = ()
        self._pretrained: dict[str, Any] = {}

    def plan(self, public: ImageSet | str, private: ImageSet | str) -> Plan:
        """σ, steps, memory and rough time, before anything is spent."""
        return self._bind(public, private, None, None).plan()

    def fit(
        self, public: ImageSet | str, private: ImageSet | str, *, out: str | Path | None = None, resume: bool = False,
        semantic_function: SemanticFunction | None = None,
    ) -> PrivImage:  # fmt: skip
        """query → select → pretrain → finetune. ``resume`` goes on with an interrupted run in the same folder."""
        run = self._bind(public, private, out, semantic_function)
        with run.opened(resume=resume):
            run.query()
            run.select()
            run.pretrain()
            self._model = run.finetune().drawable.eval()
            run.report()
        self._run, self._class_names, self.config = run, run.private.label_names, run.config
        return self

    def sample(self, n: int, labels: np.ndarray | None = None, *, seed: int | None = None) -> ImageSet:
        """n synthetic images, as many of each class as n allows, or of the given labels (n,)."""
        model = self._fitted()
        if n < 1:
            raise ValueError(f"n must be at least 1, found {n}")
        if labels is None:
            labels = np.arange(n) % len(self._class_names)
        elif len(labels) != n or labels.min() < 0 or labels.max() >= len(self._class_names):
            raise ValueError(f"labels must be {n} whole numbers in [0, {len(self._class_names)}), found {labels!r}")
        seed = self.config.seed if seed is None else seed
        size, device = self.config.sample.batch_size, _device(self.config.device)
        autocast = _autocast(self.config.precision, device)
        sampler = self.config.sample.sampler
        parts = [
            draw(model, labels[start : start + size], sampler, seed=seed, first=start, device=device, autocast=autocast)
            for start in range(0, n, size)
        ]
        return ImageSet(np.concatenate(parts), labels.astype(np.int64), self._class_names, name="synthetic")

    def evaluate(self, test: ImageSet | str) -> dict[str, Any]:
        """Metrics against real test images; not private."""
        if self._run is None:
            raise RunError("evaluate needs the run it was fitted in; call fit first")
        self._run._given["test"] = test if isinstance(test, ImageSet) else self._run._open("test", test)
        self._run.__dict__.pop("_private_and_test", None)
        with self._run.opened(resume=True):
            result = self._run.evaluate()
            self._run.report()
        assert result is not None
        return result

    def privacy_spent(self) -> dict[str, Any]:
        """ε as composed from the ledger, δ, and what they refer to."""
        if self._run is not None:
            return self._run.spent()
        self._fitted()
        return dict(self._pretrained)

    def save_pretrained(self, path: str | Path) -> None:
        """Weights as safetensors, configuration, ledger and card."""
        save_pretrained(self._fitted(), path, class_names=self._class_names, run=self._run)
        if self._run is not None:
            card = self._run.folder.path / "README.md"
            atomic_write_text(Path(path) / "README.md", card.read_text())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> PrivImage:
        """A model that can be sampled from. Reads safetensors and JSON only."""
        model, names, _ = load_pretrained(path)
        described = json.loads((Path(path) / "config.json").read_text())
        self = cls(sample={"sampler": described["sampler"]} if "sampler" in described else {})
        self._model, self._class_names = model, names
        self._pretrained = described.get("privacy", {})
        return self

    def _fitted(self) -> Drawable:
        if self._model is None:
            raise RunError("there is no model yet; call fit, or PrivImage.from_pretrained")
        return self._model

    def _bind(
        self, public: ImageSet | str, private: ImageSet | str, out: str | Path | None, semantic_function: SemanticFunction | None
    ) -> Run:
        sources = {"public": public, "private": private}
        sets = {name: s for name, s in sources.items() if isinstance(s, ImageSet)}
        data = replace(self.config.data, **{name: str(s) for name, s in sources.items() if name not in sets})
        if sets:  # in-memory images bring their own size
            first = next(iter(sets.values()))
            data = replace(data, resolution=first.resolution, channels=first.channels)
        config = replace(self.config, data=data, out=str(out or tempfile.mkdtemp(prefix="privimage-")))
        return Run(config, semantic_function=semantic_function, **sets)
