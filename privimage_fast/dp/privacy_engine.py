"""Differential privacy for a training script, under Opacus' names: only the import changes.

``make_private`` returns the user's own module (watched from then on), a :class:`DPOptimizer` around the user's optimizer and a
loader of Poisson batches. What each does is in its module; docs/privacy_engine.md lists where the behaviour differs from Opacus
and why.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from privimage_fast.dp import accounting, checkpoint
from privimage_fast.dp.accountant import Accountant
from privimage_fast.dp.accounting import DPSGDEvent, Event, GaussianEvent
from privimage_fast.dp.clipping import AdaptiveClipping, make_clipping
from privimage_fast.dp.collector import fixed
from privimage_fast.dp.dp_optimizer import DPOptimizer, NoiseSource
from privimage_fast.dp.engine import STRATEGIES, check_store_dtype
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.loader import DPDataLoader, DrawnBatch
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.planner import cheapest, device_of
from privimage_fast.dp.recorder import Recorder, recorder_of
from privimage_fast.dp.sampling import SeededRandom
from privimage_fast.dp.tracker import trainable_parameters
from privimage_fast.dp.validator import ModuleValidator

logger = logging.getLogger(__name__)

# Keywords of Opacus that choose between ways to the same result, or tune its accountants: nothing here depends on them.
_WITHOUT_EFFECT = ("epsilon_tolerance", "eps_error", "delta_error", "alphas", "strict")


class PrivacyEngine:
    """Makes a module, its optimizer and its data loader private, and keeps the account.

    Args:
        accountant: "pld" (pessimistic; the package's own figure), or Opacus' "prv" or "rdp".
        secure_mode: Opacus' name; noise and sampling are always secure, so False changes nothing.
        secure: False makes noise and sampling repeatable from ``seed``. NOT PRIVATE: for tests.
        seed: with ``secure=False``.
        ledger: an open :class:`~privimage_fast.dp.ledger.Ledger`; each step is written to it before anything changes, and refused
            past its target ε. ε then includes what else the ledger holds.

    One engine is for one data set; several ``make_private`` calls add up.
    """

    def __init__(
        self, *, accountant: str = "pld", secure_mode: bool | None = None, secure: bool = True, seed: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:  # fmt: skip
        if secure and seed is not None:
            raise ValueError("a seed makes noise that protects nobody; it needs secure=False, for tests")
        if not secure and seed is None:
            raise ValueError("secure=False needs a seed: it is for tests that repeat")
        if not secure:
            logger.warning("secure=False: noise and sampling can be reproduced from the seed. NOT PRIVATE")
        elif secure_mode is False:
            logger.info("secure_mode=False has no effect: noise and sampling are always from the operating system's randomness")
        if ledger is not None and not isinstance(ledger, Ledger):
            raise TypeError(f"ledger is {ledger!r}; open one: pf.Ledger(path, target_epsilon=…, delta=…, population=N)")
        if ledger is not None and not secure and not ledger.seeded:
            raise ValueError("secure=False with a ledger that is not opened with seeded=True: its records would look private")
        self.accountant, self.ledger = Accountant(accountant), ledger
        self.secure = secure
        self._noise = NoiseSource(NoiseKey.from_os() if seed is None else NoiseKey.from_seed(seed))
        self._randomness = None if seed is None else SeededRandom(seed)
        self._told_adjacency = False

    # --- making private

    def make_private(
        self, *, module: nn.Module, optimizer: Optimizer, criterion: Any = None, data_loader: DataLoader[Any],
        noise_multiplier: float, max_grad_norm: float | Sequence[float], batch_first: bool = True, loss_reduction: str = "mean",
        poisson_sampling: bool = True, clipping: str = "flat", noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks", wrap_model: bool = True, rand_on_empty: bool = False, multiplicity: int = 1,
        population: int | None = None, strategy: str = "auto", store_dtype: torch.dtype = torch.float32, **options: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """(module, optimizer, data_loader) for private training; with a "ghost" ``grad_sample_mode`` the criterion comes third.

        Args:
            module: rows first. It stays the same object with the same state_dict keys; a deepcopy of it is an ordinary module.
            optimizer: any torch.optim optimizer over parameters of ``module``.
            criterion: looked at only, if given: its ``reduction`` has to be ``loss_reduction``.
            data_loader: gives the sample rate q = 1/len(data_loader) and the expected batch size q·N.
            noise_multiplier: σ, standard deviation of the noise ÷ sensitivity.
            max_grad_norm: C; for clipping="per_layer" also one bound for each trainable parameter.
            loss_reduction: "mean" if the loss is the mean over the rows it is called with, "sum" if it is their sum.
            poisson_sampling: False keeps the loader's batches: no amplification, and ε is for another adjacency
                (:meth:`get_epsilon`).
            clipping: "flat", "per_layer", "automatic" (``gamma``) or "adaptive" (``target_unclipped_quantile``,
                ``clipbound_learning_rate``, ``min_clipbound``, ``max_clipbound``, ``unclipped_num_std``).
            multiplicity: K adjacent rows belong to one sample, whose gradient is that of the mean of its rows' losses.
            population: N, stated as a public value; the ledger's, or len(dataset), unless given.
            strategy, store_dtype: as in :func:`privimage_fast.clipped_grad`.
            batch_first, grad_sample_mode, wrap_model, rand_on_empty: Opacus' keywords; True, any, any, False.

        Raises:
            UnsupportedModuleError: batch norm and the like, by name. ValueError: parameters that are not the module's, options
            out of range. TypeError: unknown options.
        """
        _check_module(module, optimizer)
        _check_criterion(criterion, loss_reduction)
        if not batch_first:
            raise ValueError("batch_first=False is not covered: put the rows in the first dimension of every tensor")
        if rand_on_empty:
            raise ValueError("rand_on_empty=True would train on a made-up sample; empty batches need nothing here")
        if isinstance(noise_multiplier, bool) or not 0 <= float(noise_multiplier) < math.inf:
            raise ValueError(f"noise_multiplier is {noise_multiplier!r}; it must be finite and 0 or more")
        if isinstance(multiplicity, bool) or int(multiplicity) != multiplicity or multiplicity < 1:
            raise ValueError(f"multiplicity must be a whole number ≥ 1, found {multiplicity!r}")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, found {strategy!r}")
        check_store_dtype(store_dtype)
        if self.ledger is not None and not poisson_sampling:
            raise ValueError("poisson_sampling=False has another adjacency than the ledger, whose figures could not be added up")
        if grad_sample_mode != "hooks" or not wrap_model:
            logger.info("grad_sample_mode and wrap_model have no effect: there is one way to per-sample gradients here")
        for name in _WITHOUT_EFFECT:
            options.pop(name, None)
        original = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        trained = {id(p) for group in original.param_groups for p in group["params"]}
        by_id = {id(p): name for name, p in trainable_parameters(module).items() if id(p) in trained}
        names = [by_id[id(p)] for group in original.param_groups for p in group["params"] if id(p) in by_id]
        strategy_of_clipping = make_clipping(clipping, max_grad_norm, names, options)
        if isinstance(strategy_of_clipping, AdaptiveClipping):
            strategy_of_clipping.gradient_noise_multiplier(float(noise_multiplier))  # refused now rather than in the first step
        if options:
            raise TypeError(f"make_private got unknown options for clipping={clipping!r}: {', '.join(sorted(options))}")

        loader = DPDataLoader.from_data_loader(
            data_loader, poisson_sampling=poisson_sampling, population=self._population(population), randomness=self._randomness
        )
        existing = recorder_of(module)
        if existing is not None:
            existing.detach()
        choose = cheapest(device_of(module), store_dtype) if strategy == "auto" else fixed(strategy)
        recorder = Recorder(module, multiplicity=int(multiplicity), choose=choose, store_dtype=store_dtype)
        noise = self._noise_source(noise_generator)
        private = DPOptimizer(
            original, recorder=recorder, clipping=strategy_of_clipping, noise_multiplier=float(noise_multiplier),
            expected_batch_size=loader.expected_batch_size, loss_reduction=loss_reduction, charge=self._charge_for(loader),
            noise=noise,
        )  # fmt: skip
        loader.listener = private
        recorder.attach()
        if "ghost" in grad_sample_mode:
            return module, private, nn.CrossEntropyLoss() if criterion is None else criterion, loader
        return module, private, loader

    def make_private_with_epsilon(
        self, *, module: nn.Module, optimizer: Optimizer, data_loader: DataLoader[Any], target_epsilon: float,
        target_delta: float, epochs: float, max_grad_norm: float | Sequence[float], poisson_sampling: bool = True,
        population: int | None = None, **keywords: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """:meth:`make_private` with the smallest noise that keeps ``epochs`` passes, and what was charged before, within the
            target.

        Raises BudgetError where no noise does; otherwise as :meth:`make_private`, whose other keywords it takes.
        """
        if "noise_multiplier" in keywords:
            raise TypeError(
                "make_private_with_epsilon finds the noise_multiplier; give either it (make_private) or target_epsilon"
            )
        loader = DPDataLoader.from_data_loader(
            data_loader, poisson_sampling=poisson_sampling, population=self._population(population)
        )
        steps = math.ceil(epochs * loader.length) if poisson_sampling else math.ceil(epochs)
        sigma = self._solve(target_epsilon, target_delta, loader.sample_rate, steps)
        return self.make_private(
            module=module, optimizer=optimizer, data_loader=data_loader, noise_multiplier=sigma, max_grad_norm=max_grad_norm,
            poisson_sampling=poisson_sampling, population=population, **keywords,
        )  # fmt: skip

    def _population(self, stated: int | None) -> int | None:
        """The public N: the ledger's where there is one."""
        if self.ledger is None:
            return stated
        if stated not in (None, self.ledger.header.population):
            raise ValueError(f"population is {stated}, but the ledger was opened with {self.ledger.header.population}")
        return self.ledger.header.population

    def _solve(self, target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
        prior, accountant = self._events(), self.accountant.mechanism()
        run: dict[str, Any] = {"target_epsilon": target_epsilon, "delta": delta, "sample_rate": sample_rate, "steps": steps}
        sigma = accounting.solve_noise_multiplier(**run, prior_events=prior)

        def fits(noise_multiplier: float) -> bool:
            events = [*prior, DPSGDEvent(noise_multiplier, sample_rate, steps)]
            return accounting.epsilon(events, delta, accountant=accountant) <= target_epsilon

        if accountant == "pld" or fits(sigma):
            return sigma
        # The other accountants report more than PLD does, and it is their figure that get_epsilon will show.
        low, high = sigma, sigma * 1.01
        while not fits(high):
            low, high = high, high * 1.2
            if high > accounting.MAX_NOISE_MULTIPLIER:
                raise accounting.BudgetError(f"no noise multiplier keeps {steps} steps within {target_epsilon} by {accountant}")
        while high / low > 1.003:  # a PRV composition takes seconds
            middle = math.sqrt(low * high)
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _noise_source(self, generator: torch.Generator | None) -> NoiseSource:
        if generator is None:
            return self._noise
        if self.secure:
            raise ValueError("noise_generator makes noise that can be reproduced, which protects nobody; it needs secure=False")
        return NoiseSource(NoiseKey.from_seed(int(torch.randint(2**62, (), generator=generator))))

    # --- the account

    def _charge_for(self, loader: DPDataLoader) -> Any:
        """What the optimizer calls before a step: (noise_multiplier, batch)."""
        sample_rate = loader.sample_rate
        paid: tuple[object, set[float]] = (None, set())  # a pass over the loader, and the noise multipliers it was charged with

        def charge(noise_multiplier: float, batch: DrawnBatch | None) -> None:
            nonlocal paid
            if batch is None:  # from elsewhere: each step might hold any sample, so nothing is gained by sampling
                if self.ledger is not None:
                    raise RuntimeError(
                        "optimizer.step() on a batch that is not of the private data loader: what one sample more would do to "
                        f"such batches is not known, and {self.ledger.path} promises {self.ledger.header.adjacency}. Iterate the "
                        "loader that make_private returned, or go without a ledger"
                    )
                self._charge(GaussianEvent(noise_multiplier))
                return
            if loader.poisson:
                self._charge(DPSGDEvent(noise_multiplier, sample_rate))
                return
            # A sample is in one batch of a pass, so the pass costs what one step on the whole set costs.
            if paid[0] is not batch.pass_id:
                paid = (batch.pass_id, set())
            if noise_multiplier not in paid[1]:
                self._charge(GaussianEvent(noise_multiplier))
                paid[1].add(noise_multiplier)

        return charge

    def _charge(self, event: Event) -> None:
        if self.ledger is not None:
            self.ledger.charge(event, stage="training")
        self.accountant.charge(event)

    def _events(self) -> list[Event]:
        """The ledger's where there is one (it holds other stages too), else the accountant's."""
        return self.ledger.events() if self.ledger is not None else self.accountant.events()

    def get_epsilon(self, delta: float) -> float:
        """ε spent so far at ``delta``; add or remove one sample.

        After ``poisson_sampling=False`` the figure holds for another adjacency: one sample's gradient is there or zero, while
        the batches stay what they are. Each pass then counts as one Gaussian mechanism on the whole set, without amplification.
        """
        events = self._events()
        if any(isinstance(e, GaussianEvent) for e in self.accountant.events()) and not self._told_adjacency:
            self._told_adjacency = True
            logger.warning(
                "without Poisson sampling ε is for zeroing one sample's contribution, not for adding or removing it, and nothing "
                "is gained by sampling"
            )
        return accounting.epsilon(events, delta, accountant=self.accountant.mechanism())

    # --- compatibility

    def is_compatible(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> bool:
        return ModuleValidator.is_valid(module)

    def validate(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> None:
        """Raises UnsupportedModuleError where :meth:`is_compatible` is False."""
        ModuleValidator.validate(module, strict=True)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy whose layers can be trained privately (:meth:`ModuleValidator.fix_and_validate`)."""
        return ModuleValidator.fix_and_validate(module)

    # --- checkpoints

    def save_checkpoint(
        self, *, path: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer | None = None,
        checkpoint_dict: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Module, optimizer and account as one safetensors file; ``checkpoint_dict`` holds further JSON values."""
        checkpoint.save_file(
            path, module=module, optimizer=optimizer, account=self.accountant.state_dict(), extra=checkpoint_dict or {}
        )

    def load_checkpoint(
        self, *, path: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer | None = None
    ) -> dict[str, Any]:
        """Restores what :meth:`save_checkpoint` wrote, returns ``checkpoint_dict``. What was charged since stays charged."""
        account, extra = checkpoint.load_file(path, module=module, optimizer=optimizer)
        self.accountant.load_state_dict(account)
        if self.ledger is not None:
            written = accounting.merge_events(self.ledger.events())
            for (sigma, rate), steps in accounting.merge_events(self.accountant.events()).items():
                if steps > written.get((sigma, rate), 0):
                    raise ValueError(
                        f"{path}: its weights have taken {steps} steps at σ = {sigma:g}, q = {rate:g}, but the ledger holds "
                        f"{written.get((sigma, rate), 0)}: use the ledger that they were charged to"
                    )
        return extra


def _check_module(module: nn.Module, optimizer: Optimizer) -> None:
    if isinstance(module, DistributedDataParallel | DataParallel):
        raise ValueError(f"{type(module).__name__} is not covered: its replicas compute gradients where nobody watches them")
    ModuleValidator.validate(module, strict=True)
    own = {id(p) for p in module.parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in own:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} that is not the module's; make it from "
                    "module.parameters() of the same module (after ModuleValidator.fix, which copies)"
                )
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{type(module).__name__} has no trainable parameter in the optimizer")


def _check_criterion(criterion: Any, loss_reduction: str) -> None:
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction is {loss_reduction!r}; it must be 'mean' or 'sum'")
    reduction = getattr(criterion, "reduction", loss_reduction)
    if reduction != loss_reduction:
        raise ValueError(
            f"the criterion has reduction={reduction!r}, but loss_reduction is {loss_reduction!r}: gradients would be scaled by "
            "the wrong number of rows, and clipped so"
        )
    if getattr(criterion, "weight", None) is not None and reduction == "mean":
        raise ValueError(
            "a criterion with class weights and reduction='mean' divides by the weights of the whole batch, so one sample's "
            "gradient depends on the others; use reduction='sum' with loss_reduction='sum', or weight the samples yourself"
        )
