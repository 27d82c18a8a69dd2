"""Evaluation mode for a while, whatever the model is made of and whoever else is using it."""

import threading
import time

import pytest
from torch import nn

from minilm import SentenceEncoder
from minilm.inference.eval_mode import eval_mode


class Holder(nn.Module):
    """Modules under any names; None among them, as in a layer without its optional part."""

    def __init__(self, *parts: nn.Module | None) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            self.add_module(str(number), part)


def nested() -> nn.Module:
    return Holder(
        nn.Linear(2, 2),
        None,
        nn.ModuleList([nn.Sequential(nn.Dropout(), nn.ModuleDict({"deep": nn.Dropout()}))]),
    )


def parts(model: nn.Module) -> list[nn.Module]:
    with eval_mode(model) as found:
        return found


def test_all_modules_are_given_at_any_depth() -> None:
    model = nested()
    assert set(parts(model)) == set(model.modules())
    assert len(parts(model)) == 7


def test_a_deep_module_alone_in_training_is_switched_and_switched_back() -> None:
    model = nested().eval()
    deep = model.get_submodule("2.0.1.deep")
    deep.train()
    with eval_mode(model):
        assert not deep.training
    assert [module for module in model.modules() if module.training] == [deep]


def test_shared_modules_are_given_once() -> None:
    shared = nn.Dropout()
    model = Holder(shared, Holder(shared), shared, None)
    assert sorted(map(id, parts(model))) == sorted(map(id, model.modules()))
    assert len(parts(model)) == 3


def test_a_module_in_a_circle_is_given_once() -> None:
    model = Holder()
    model.add_module("itself", Holder(model))
    for module in model.modules():  # torch's own eval() would not come back
        module.training = False
    assert len(parts(model)) == 2


def test_each_module_gets_its_own_mode_back() -> None:
    model = nested()
    model.get_submodule("2.0").eval()
    before = {name: module.training for name, module in model.named_modules()}
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


def test_mode_comes_back_after_an_error() -> None:
    model = nested()
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        raise ZeroDivisionError
    assert all(module.training for module in model.modules())


def test_uses_may_overlap() -> None:
    """The first to come is not the last to go."""
    model = nested()
    first, second = eval_mode(model), eval_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert all(module.training for module in model.modules())


def test_a_part_switched_to_training_meanwhile_is_switched_off_and_given_back() -> None:
    model = nested().eval()
    part = model.get_submodule("0")
    with eval_mode(model):
        part.train()
        with eval_mode(model):
            assert not part.training
        assert not part.training  # until the last one leaves
    assert part.training
    assert not model.training


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_was_set_meanwhile_comes_at_the_end(
    tiny_encoder: SentenceEncoder, training: bool
) -> None:
    tiny_encoder.train(not training)
    with eval_mode(tiny_encoder), eval_mode(tiny_encoder):
        assert tiny_encoder.train(training) is tiny_encoder
        assert not any(module.training for module in tiny_encoder.modules())
    assert {module.training for module in tiny_encoder.modules()} == {training}


class Yielding(nn.Module):
    """Lets other threads go on whenever its mode is asked for: amid a switch."""

    @property
    def training(self) -> bool:
        time.sleep(0)
        return bool(self.__dict__["mode"])

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["mode"] = mode


def test_many_threads() -> None:
    model = nn.Sequential(nested(), Yielding())
    wrong = []

    def use() -> None:
        for _ in range(200):
            with eval_mode(model):
                if any(module.training for module in model.modules()):
                    wrong.append(1)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(module.training for module in model.modules())
