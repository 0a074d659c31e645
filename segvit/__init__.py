"""Semantic segmentation with plain vision transformers: train, evaluate, predict.

    import segvit

    model = segvit.load("runs/a")
    result = segvit.Predictor(model)("street.jpg")
    result.save("street.png")

Names load what they need when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from segvit.contracts import Classes, Dense, InputSpec, UserError
    from segvit.data.dataset import open_dataset
    from segvit.data.transforms import Augment
    from segvit.engine.settings import Optim, Schedule
    from segvit.export.build import Plan as ExportPlan
    from segvit.export.build import export_model
    from segvit.export.engines import load
    from segvit.inference.prediction import Prediction
    from segvit.inference.predictor import Predictor, Views
    from segvit.model_folder import save_model as save
    from segvit.tasks.data_check import examine as check_data
    from segvit.tasks.dense import evaluate_model as evaluate
    from segvit.tasks.dense import train
    from segvit.tasks.experiment import Experiment, Input
    from segvit.tasks.multi_task import load_tasks
    from segvit.tasks.open_vocabulary import freeze_classes, set_classes
    from segvit.zoo import MODELS, create_model

_WHERE = {
    "Augment": "segvit.data.transforms:Augment",
    "Classes": "segvit.contracts:Classes",
    "Dense": "segvit.contracts:Dense",
    "Experiment": "segvit.tasks.experiment:Experiment",
    "Input": "segvit.tasks.experiment:Input",
    "ExportPlan": "segvit.export.build:Plan",
    "InputSpec": "segvit.contracts:InputSpec",
    "MODELS": "segvit.zoo:MODELS",
    "Optim": "segvit.engine.settings:Optim",
    "Prediction": "segvit.inference.prediction:Prediction",
    "Predictor": "segvit.inference.predictor:Predictor",
    "Schedule": "segvit.engine.settings:Schedule",
    "UserError": "segvit.contracts:UserError",
    "Views": "segvit.inference.predictor:Views",
    "check_data": "segvit.tasks.data_check:examine",
    "create_model": "segvit.zoo:create_model",
    "evaluate": "segvit.tasks.dense:evaluate_model",
    "freeze_classes": "segvit.tasks.open_vocabulary:freeze_classes",
    "export_model": "segvit.export.build:export_model",
    "load": "segvit.export.engines:load",
    "load_tasks": "segvit.tasks.multi_task:load_tasks",
    "open_dataset": "segvit.data.dataset:open_dataset",
    "save": "segvit.model_folder:save_model",
    "set_classes": "segvit.tasks.open_vocabulary:set_classes",
    "train": "segvit.tasks.dense:train",
}

__all__ = [
    "MODELS",
    "Augment",
    "Classes",
    "Dense",
    "Experiment",
    "ExportPlan",
    "Input",
    "InputSpec",
    "Optim",
    "Prediction",
    "Predictor",
    "Schedule",
    "UserError",
    "Views",
    "check_data",
    "create_model",
    "evaluate",
    "export_model",
    "freeze_classes",
    "load",
    "load_tasks",
    "open_dataset",
    "save",
    "set_classes",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'segvit' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return vars(import_module(module))[attribute]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
