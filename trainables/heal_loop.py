"""The Ray Tune trainable: one trial is one HealLoop, one step is one round.

The model is loaded once per actor and stays resident between trials. A step never raises: an error, a request to stop
and a starved round are results with an `end`, so one bad trial cannot take the search down. What happens to each stage
is appended to an event file of this process, which the driver's display reads.
"""

from __future__ import annotations

import gc
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray import tune

from steerheal import events
from steerheal.errors import Stop, UserError, card_failed, ran_out
from steerheal.settings import from_flat
from steerheal.stages import Event, Store, atomic_write


class HealTrial(tune.Trainable):
    """config: flat (settings by dotted name), index, params, folder (of the search), store (of the stages),
    commit (of a hub model), gpu (a trial's share of a card), contents (hashes of the files that settings name)."""

    def setup(self, config: dict[str, Any]) -> None:
        self.lm: Any = None
        self.lm_settings: tuple[Any, ...] = ()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.folder = Path(config["folder"])
        self.index = config["index"]
        self.events = events.own(self.folder)
        self.trial_config = config
        self.loop: Any = None
        self.rounds: Iterator[Any] = iter(())
        self.last: dict[str, Any] | None = None

    def _open(self) -> None:
        """Build the loop on first use, so that bad settings end as this trial's error."""
        from steerheal import memory, models
        from steerheal.loop import HealLoop
        from steerheal.plan import contents

        settings = from_flat(self.trial_config["flat"] | self.trial_config["params"])
        if changed := [name for name, value in contents(settings).items() if self.trial_config["contents"].get(name) != value]:
            raise UserError(f"{' and '.join(changed)} changed while the search runs, and its trials would no longer be "
                            f"comparable. Undo the change and give the same command again, or begin anew: --name OTHER.")
        wanted = (settings.model, settings.dtype, settings.quantise, settings.attention, settings.device)
        if self.lm_settings != wanted:
            self._note("loading the model", "start")
            self.lm, self.lm_settings = None, ()
            gc.collect()  # two models at once may not fit
            if 0 < self.trial_config["gpu"] < 1 and models.usable_device(settings.device) == "cuda":
                import torch

                torch.cuda.empty_cache()
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(memory.allocatable(self.trial_config["gpu"], total))
            self.lm, self.lm_settings = models.load(settings, self.trial_config["commit"]), wanted
        self.loop = HealLoop(settings, self.lm, Store(self.trial_config["store"], self._on_event))
        self.rounds = self.loop.rounds()

    def step(self) -> dict[str, Any]:
        if self.last is not None and self.last["done"]:
            return self.last
        result: dict[str, Any] = dict(index=self.index, end="", error="", row="", baselines="", trait="", starved="",
                                      fatal=False)
        try:
            if (self.folder / ".stop").exists():
                raise Stop
            if self.loop is None:
                self._open()
            round_ = next(self.rounds, None)
            result |= dict(end=self.loop.end or "", error=self.loop.why, starved=json.dumps(self.loop.starved))
            if round_ is not None:
                result["row"] = json.dumps(round_.row())
            if round_ is None or round_.outcome.round == 0:  # a trial that starves at once has measured them, too
                result["baselines"] = json.dumps(self.loop.baselines().rows())
                result["trait"] = self.loop.baselines().trait_reason
        except Stop:
            result["end"] = "stopped"
        except UserError as error:
            # where no searched setting is named, every other trial would meet it too: the settings' or the machine's fault
            own = any("." in name and f"{name} =" in str(error) for name in self.trial_config["params"])
            result |= dict(end="error", error=str(error), fatal=not own)
        except MemoryError as error:
            result |= dict(end="out of memory", error=str(error))
        except Exception as error:
            oom = ran_out(error)
            log = self.folder / "errors" / f"trial-{self.index}.txt"
            result |= dict(end="out of memory" if oom else "error",
                           error=f"{type(error).__name__}: {error} (traceback in {log})")
            try:
                atomic_write(log, traceback.format_exc().encode())
                self._note(result["error"], "error")
            except UserError as full:
                result |= dict(error=str(full), fatal=True)
            if card_failed(error) and not oom:  # this process can never use the card again, and the next trials are its, too
                os._exit(1)  # Ray starts the trial again in another
        result["done"] = bool(result["end"])
        self.last = result
        return result

    def _on_event(self, event: Event) -> None:
        if event.kind == "start" and (self.folder / ".stop").exists():
            raise Stop
        self._note(self.loop.where, event.kind, event)

    def _note(self, where: str, kind: str, event: Event | None = None) -> None:
        events.append(self.events, self.index, where, kind, event)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return dict(chain=[] if self.loop is None else list(self.loop.bench.loaded))

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: a trial that starts again replays its finished stages from the store."""
