"""The whole method over one run folder: opening it, what may be asked of it, and its stages in order."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from privimage_fast import report
from privimage_fast.config import ConfigError, RunConfig, differing_keys, load_config
from privimage_fast.data import ImageSet, holdout_split
from privimage_fast.data.atomic import atomic_write_text
from privimage_fast.dp.accounting import ADJACENCY, UNIT
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.sampling import OSRandom, SeededRandom
from privimage_fast.models.classifier import Classifier
from privimage_fast.models.labeller import Labeller
from privimage_fast.models.training import Drawable, ImageModel
from privimage_fast.opening import (
    autocast_of,
    check_apart,
    check_inputs,
    check_ledger,
    check_place,
    check_public_numbers,
    check_reopened,
    device_of,
    open_source,
    resolve,
    tell_settings,
)  # fmt: skip
from privimage_fast.planning import Plan, make_plan, planned_budget, query_noise_multiplier, reserved
from privimage_fast.stages.agreement import check_text, question, stand_in_tables
from privimage_fast.stages.clusters import public_clusters
from privimage_fast.stages.evaluate import check_evaluation, run_evaluate
from privimage_fast.stages.finetune import budget_record, run_finetune
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, timed
from privimage_fast.stages.label import kept_labeller, run_label
from privimage_fast.stages.means import load_means, pictures, run_means
from privimage_fast.stages.pretrain import run_pretrain
from privimage_fast.stages.query import SemanticFunction, public_classifier, run_query, semantic_function_of
from privimage_fast.stages.sample import run_sample, save_public_sheets, save_sheet
from privimage_fast.stages.saved import Pretrained, load_pretrained, save_pretrained, saved_fingerprint, weights_fingerprint
from privimage_fast.stages.select import labels_per_class, run_select, selected_subset
from privimage_fast.stages.warmup import run_warmup

logger = logging.getLogger(__name__)


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
        self.device = device_of(config.device)
        self.autocast = autocast_of(config.precision, self.device)

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
        return open_source(data, name, source)

    @cached_property
    def public(self) -> ImageSet:
        return self._open("public")

    @cached_property
    def asked(self) -> ImageSet:
        """The public set by the labels that the query asks for: its own, or clusters."""
        return self._label_space(self.folder)[0]

    def _label_space(self, folder: RunFolder) -> tuple[ImageSet, SemanticFunction | None, str]:
        """That set, the function that scores its labels where it is not the classifier of the public set's own, and its name.

        Raises:
            ConfigError: both clusters and a function of the user's.
            RunError: fewer labels than the classes are to have.
        """
        c = self.config
        if c.query.clusters is None or c.select.mode != "semantic":
            return self.public, self._semantic_function, "given by the user"
        if self._semantic_function is not None:
            raise ConfigError(
                "query.clusters is set and a semantic function given; leave it null (pf.cluster_labels clusters any embedding)"
            )
        found = public_clusters(folder, c.query, self.public, seed=self._public_seed, device=self.device)
        labels_per_class(c.select, n_labels=found[0].n_classes, n_classes=self.private.n_classes, clusters=True)
        return found

    @cached_property
    def _private_and_test(self) -> tuple[ImageSet, ImageSet | None]:
        data = self.config.data
        private = self._open("private")
        if self._given["test"] is not None or data.test:
            if data.holdout:
                logger.warning("data.holdout is not used: the test images are given, and all of the sensitive set is trained on")
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

    def test_on(self, test: ImageSet | str) -> None:
        """Takes another test set, given or by its source; the images that are trained on stay what they were."""
        private = self.private
        self._given["test"] = test if isinstance(test, ImageSet) else None
        self.__dict__["_private_and_test"] = private, self._open("test", None if isinstance(test, ImageSet) else test)

    # ---- opening

    def check_inputs(self) -> None:
        """As :func:`opening.check_inputs`, of this run's sets."""
        check_inputs(self.config, self.folder, public=self.public, private=self.private, test=self.test)

    def check_evaluation(self) -> None:
        """RunError where there will be too few images to evaluate, or a package for it is missing."""
        if self.test is not None:
            synthetic = self.config.sample.per_class * self.private.n_classes
            check_evaluation(self.config.evaluate, synthetic=synthetic, test=len(self.test))

    def check_new(self, *, resume: bool) -> None:
        """Refuses a folder that holds a run, unless it is to be gone on with, and a path that is no folder."""
        if self.folder.path.exists() and not self.folder.path.is_dir():
            raise RunError(f"{self.folder.path} is a file, but a run needs a folder; choose another --out")
        check_place(self.folder.path, self.config.data)
        if self.folder.begun and not resume:
            raise RunError(
                f"{self.folder.path} already holds a run; go on with --resume (in Python resume=True), or choose another --out"
            )

    def check_reopened(self) -> None:
        """As :func:`opening.check_reopened`, of the run that is in the folder."""
        saved = load_config(self.folder.config)
        check_reopened(self.folder, self._resolved(saved), saved)

    @contextmanager
    def opened(self, *, resume: bool) -> Iterator[Run]:
        """Locks the folder, resolves the configuration against what is there, and saves it.

        Raises:
            RunError: the folder holds a run and ``resume`` is off, or holds one with other settings.
        """
        self.check_new(resume=resume)
        with self.folder.locked():
            self.check_new(resume=resume)  # another process may have begun it meanwhile
            saved = load_config(self.folder.config) if self.folder.begun else None
            if saved is not None and saved.data.test and not self.config.data.test:  # given to `evaluate` meanwhile
                self.config = replace(self.config, data=replace(self.config.data, test=saved.data.test))
            check_apart(public=self.public, private=self.private, test=self.test)
            given, self.config = self.config, self._resolved(saved)
            if saved is not None:
                check_reopened(self.folder, self.config, saved)
            check_ledger(self.folder)
            self.check_inputs()
            if saved is None:
                tell_settings(self.config, given)
                self.check_evaluation()
                check_public_numbers(self.config, images=len(self.private))
            elif self.config.privacy.population != len(self.private):
                logger.warning(
                    "%s was begun for a stated N of %d sensitive images; %d were found now, and N stays",
                    self.folder.path, self.config.privacy.population, len(self.private),
                )  # fmt: skip
            atomic_write_text(self.folder.config, self.config.to_yaml())
            try:
                yield self
            finally:
                self.__dict__.pop("noise_key", None)  # an interrupted step's place in the noise must not be met again
                if "ledger" in self.__dict__:
                    self.__dict__.pop("ledger").close()

    def _resolved(self, saved: RunConfig | None) -> RunConfig:
        private = self.private
        return resolve(self.config, saved, images=len(private), n_classes=private.n_classes, public=self.public)

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
        asked, function, described = self._label_space(self.folder)
        query = run_query(
            self.folder, c.query, public=asked, private=self.private, votes_per_image=c.query.votes_per_image,
            noise_multiplier=c.query.noise_multiplier, ledger=self.ledger, noise_key=self.noise_key, seed=self._public_seed,
            device=self.device, semantic_function=function, described=described,
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
            # The run's own classifier, clusters and table, if it was begun with these settings.
            begun = self.folder.begun and not [
                key for key in differing_keys(load_config(self.folder.config), c)
                if key.startswith(("query.", "data.", "select.", "privacy.")) or key in ("seed", "public_seed")
            ]  # fmt: skip
            folder = self.folder if begun else RunFolder(place)
            query = folder.read_json(folder.query, "query") if folder.query.exists() else None
            if folder is not self.folder:
                folder.create()
            return check_text(self._question(folder, query))

    def _question(self, folder: RunFolder, query: dict[str, Any] | None) -> dict[str, Any]:
        c = self.config
        each, votes, population = c.select.labels_per_class, c.query.votes_per_image, c.privacy.population
        assert each and votes and population and c.privacy.delta
        epsilon, delta = c.privacy.epsilon, c.privacy.delta
        asked, given, _ = self._label_space(folder)
        function, _ = semantic_function_of(folder, c.query, public=asked, seed=self._public_seed, device=self.device, given=given)
        stand_ins = stand_in_tables(
            function, self.public, asked, n_classes=self.private.n_classes, population=population, votes_per_image=votes,
            seed=self._public_seed, device=self.device,
        )  # fmt: skip
        by_share = math.isclose(c.query.noise_multiplier or 0.0, query_noise_multiplier(epsilon, delta, c.query.share))
        return question(
            lambda share: query_noise_multiplier(epsilon, delta, share), k=each, votes_per_image=votes, population=population,
            assignment=c.select.assignment, stand_ins=stand_ins, query=query, share=c.query.share if by_share else None,
            noise_multiplier=c.query.noise_multiplier,
        )  # fmt: skip

    def select(self) -> dict[str, Any]:
        c = self.config
        assert c.select.labels_per_class is not None
        query = self.folder.read_json(self.folder.query, "query") if c.select.mode == "semantic" else None
        return run_select(
            self.folder, c.select, public=self.asked, class_names=self.private.label_names, query=query,
            labels_each=c.select.labels_per_class, seed=c.seed, n_labels=c.query.n_labels(self.public),
        )  # fmt: skip

    def pretrain(self) -> ImageModel:
        c, model = self.config, self.model()
        indices, labels = self._subset()
        run_pretrain(
            self.folder, c.pretrain, model=model, public=self.public, indices=indices, labels=labels, seed=self._public_seed,
            device=self.device, autocast=self.autocast,
        )  # fmt: skip
        if not (self.folder.samples / "before.png").exists():
            save_public_sheets(
                self.folder, c.sample.sampler, model=model.drawable, public=self.public, indices=indices, labels=labels,
                class_names=self.private.label_names, seed=c.seed, device=self.device, autocast=self.autocast,
            )  # fmt: skip
        return model

    def _subset(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the chosen public images, and the classes they stand for."""
        selection = self.folder.read_json(self.folder.selection, "select")
        return selected_subset(selection, self.asked, self.private.label_names)

    def warmup(self) -> ImageModel:
        """Noisy class means, and training on them; where none are asked for, the model as it was pre-trained."""
        c, model = self.config, self.model()
        model.load_state_dict(self.folder.load_tensors(self.folder.checkpoint("pretrain"), "pretrain")[0])
        if not c.warms_up:
            return model
        if self.ledger.steps_charged("finetune") and not self.folder.means.exists():
            raise RunError(f"{self.folder.path} was fine-tuned without a warm-up; go on with --warmup.steps 0")
        assert c.warmup.noise_multiplier is not None and c.warmup.modes and c.warmup.rounds
        indices, labels, names = *self._subset(), self.private.label_names
        model.means = run_means(
            self.folder, public=self.public, chosen=indices, labels=labels, modes=c.warmup.modes, max_norm=c.warmup.max_norm,
            seed=self._public_seed, rounds=c.warmup.rounds,
            private=self.private, noise_multiplier=c.warmup.noise_multiplier, ledger=self.ledger, noise_key=self.noise_key,
        )  # fmt: skip
        save_sheet(self.folder, "means", pictures(self.folder, names))
        run_warmup(
            self.folder, c.warmup, model=model, images=self.public.images[indices], labels=labels, seed=self._public_seed,
            device=self.device, autocast=self.autocast,
        )  # fmt: skip
        return model

    def finetune(self) -> ImageModel:
        c, model = self.config, self.model()
        before = "warmup" if c.warms_up else "pretrain"
        model.load_state_dict(self.folder.load_tensors(self.folder.checkpoint(before), before)[0])
        if c.warms_up:
            model.means = load_means(self.folder).to(self.device)
        assert c.privacy.population is not None and c.privacy.delta is not None
        if not c.privacy.train:
            self._keep_public(model)
            return model
        run_finetune(
            self.folder, c.finetune, model=model, private=self.private, population=c.privacy.population,
            target_epsilon=c.privacy.epsilon, delta=c.privacy.delta, ledger=self.ledger, noise_key=self.noise_key,
            randomness=OSRandom() if c.privacy.secure else SeededRandom(c.seed), seed=c.seed, device=self.device,
            autocast=self.autocast, reserved=reserved(c),
        )  # fmt: skip
        self._publish(model.drawable)
        return model

    def label(self) -> Labeller | None:
        """What gives synthetic images their labels; None where they keep those that they are drawn for."""
        c = self.config
        if not c.relabels:
            if self.ledger.steps_charged("label") and self.folder.model.exists():  # given up: published without
                self._publish(load_pretrained(self.folder.model).model)
            return None
        if not (self.folder.model.exists() and self.folder.checkpoint("finetune").exists()):
            raise RunError(f"{self.folder.path} holds no fine-tuned model; run `privimage finetune` first")
        assert c.privacy.population is not None and c.privacy.delta is not None
        model = load_pretrained(self.folder.model).model
        labeller = run_label(
            self.folder, c.label, model=model, weights=weights_fingerprint(model.state_dict()), sample=c.sample,
            private=self.private, population=c.privacy.population, target_epsilon=c.privacy.epsilon, delta=c.privacy.delta,
            ledger=self.ledger, noise_key=self.noise_key, seed=c.seed, device=self.device, autocast=self.autocast,
        )  # fmt: skip
        self._publish(model)
        return labeller

    def _keep_public(self, model: ImageModel) -> None:
        """In place of fine-tuning, for the baseline that never trains on sensitive images: no step, no charge."""
        c = self.config
        with timed(self.folder, "finetune", fingerprint("public only", c.model, c.pretrain)):
            population, delta = self.ledger.header.population, self.ledger.header.delta
            record = budget_record(c.finetune, population, c.privacy.epsilon, delta, 0.0, 0, self.ledger)
            self.folder.write_json(self.folder.budget, record)
        self._publish(model.drawable)

    def _publish(self, model: Drawable) -> None:
        """Into model/, with the labeller that is this model's; where all of it is there already, nothing is written."""
        c, labeller = self.config, None
        if c.relabels:
            labeller = kept_labeller(self.folder, c.label, self.private, weights_fingerprint(model.state_dict()))
        try:
            there, spent = load_pretrained(self.folder.model), RunFolder(self.folder.model).ledger.read_text()
        except (RunError, OSError):
            there, spent = None, ""
        alike = there is not None and there.weights == saved_fingerprint(model, labeller)
        if not (alike and there.described.get("sampler") == asdict(c.sample.sampler) and spent == self.folder.ledger.read_text()):
            self.save(model, self.folder.model, labeller)

    def save(self, model: Drawable, path: str | Path, labeller: Labeller | None) -> None:
        """The model, and its labeller where it has one, with what the run has spent and how it samples."""
        save_pretrained(
            model, path, class_names=self.private.label_names, privacy=self.spent(), sampler=self.config.sample.sampler,
            ledger=self.folder.ledger.read_text(), labeller=labeller,
            card=report.published_card(self.folder.path, label_steps=labeller.steps if labeller else None),
        )  # fmt: skip

    def _drawn_from(self) -> Pretrained:
        """The published model; without its labeller where labels were given up."""
        saved = load_pretrained(self.folder.model)
        return saved if self.config.relabels else replace(saved, labeller=None, weights=saved_fingerprint(saved.model, None))

    def sample(self) -> ImageSet:
        if not self.folder.model.exists():
            raise RunError(f"{self.folder.model} is missing; run `privimage finetune` first")
        saved = self._drawn_from()
        if self.config.relabels and saved.labeller is None:
            raise RunError(
                f"label.steps is set, and {self.folder.model} has no labeller: its labels are not learned yet, or were not "
                "published; run `privimage label` first, or set it to 0"
            )
        return run_sample(
            self.folder, self.config.sample, model=saved.model, class_names=saved.class_names, weights=saved.weights,
            seed=self.config.seed, device=self.device, autocast=self.autocast, labeller=saved.labeller,
        )  # fmt: skip

    def evaluate(self) -> dict[str, Any] | None:
        """Against the test set, where there is one."""
        if self.test is None:
            return None
        self.check_evaluation()
        c, ledger = self.config, Ledger.read(self.folder.ledger)
        return run_evaluate(
            self.folder, c.evaluate, synthetic=self.sample(), test=self.test, feature_network=self.feature_network(),
            weights=self._drawn_from().weights, seed=c.seed, device=self.device,
            private=self.private if c.evaluate.neighbours or c.evaluate.memorisation else None,
            protected=math.isfinite(ledger.epsilon()) and not ledger.seeded,
        )  # fmt: skip

    def feature_network(self) -> Classifier:
        """The public classifier, the same for every selection, so that distances of baselines can be compared."""
        query, labelled = self.config.query, self.public
        if labelled.n_classes == 1 and query.clusters is not None:  # one label teaches no features; clusters do
            labelled, *_ = public_clusters(self.folder, query, labelled, seed=self._public_seed, device=self.device)
        return public_classifier(self.folder, query.classifier, labelled, seed=self._public_seed, device=self.device)

    def report(self) -> Path:
        report.build_card(self.folder.path)
        return report.build_report(self.folder.path)

    def all(self) -> Path:
        """Every stage in order; those that are done already return at once."""
        for stage in (self.query, self.select, self.pretrain, self.warmup, self.finetune, self.label, self.sample):
            name = stage.__name__
            if name != "label" or self.config.relabels:
                logger.info("%s%s", name, ": done before" if self.folder.recorded(name) else "")
            stage()
        logger.info("evaluate")
        try:
            self.evaluate()
        finally:  # what was paid for is described, whatever became of its figures
            page = self.report()
        return page

    # ---- planning

    def plan(self) -> Plan:
        """Needs the sizes of both sets, and spends nothing."""
        check_apart(public=self.public, private=self.private, test=self.test)
        self.check_inputs()
        self.check_evaluation()
        c = self._resolved(None)
        check_public_numbers(c, images=len(self.private))
        model, n_labels = self.model().to(self.device), c.query.n_labels(self.public)
        return make_plan(c, model, n_labels=n_labels, n_classes=self.private.n_classes, autocast=self.autocast)

    def write_plan(self, plan: Plan) -> None:
        """budget.json as planned; fine-tuning replaces it by what it uses."""
        self.folder.write_json(self.folder.budget, planned_budget(self.config, plan))


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
