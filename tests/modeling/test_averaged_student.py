"""The average of a student's weights (``MODEL.DISTILLATION.EMA_DECAY``)."""

import copy

import torch

from reclip_d2.features.held_out import HeldOutViews
from reclip_d2.inference.dataset_predictor import predicting_model
from reclip_d2.modeling.meta_arch.distillation import TrainedStudent
from tests.helpers import make_distillation, random_image


def change(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Other weights and statistics, as an optimizer step gives; returns them."""
    generator = torch.Generator().manual_seed(seed)
    for value in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        with torch.no_grad():
            value += 0.1 * torch.rand(value.shape, generator=generator)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_weights_and_statistics_are_averaged():
    """The first update copies; then d * average + (1 - d) * weights."""
    model = make_distillation(ema_decay=0.75)
    states = []
    for seed in range(3):
        states.append(change(model.student, seed))
        model.update_average()
    found = model.state_dict()
    assert set(found) == set(states[0])
    statistics = [name for name in found if name.endswith("running_var")]
    assert statistics
    for name, value in found.items():
        if not value.is_floating_point():
            continue
        first, second, third = (state[name].double() for state in states)
        expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(model.student.state_dict()[statistics[0]], states[2][statistics[0]])


def test_inference_is_the_average_and_training_the_student():
    model = make_distillation(ema_decay=0.5)
    for seed in range(2):
        change(model.student, seed)
        model.update_average()
    average = copy.deepcopy(model.average.module)
    assert predicting_model(model) is model.average.module
    record = {"image": random_image(0)}
    raw = model.student.eval()([record])[0]["sem_seg"]
    model.train()
    assert model.student.training and not model.average.module.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.eval()([record])[0]["sem_seg"]
    assert torch.equal(found, average.eval()([record])[0]["sem_seg"]) and not torch.equal(found, raw)
    # Looking at masks during training, after an evaluation that left the average in training mode, changes nothing.
    model.train()
    model.average.train()
    HeldOutViews([record]).labels(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_the_student_trains():
    model = make_distillation(ema_decay=0.5)
    assert not any(parameter.requires_grad for parameter in model.average.parameters())
    assert any(parameter.requires_grad for parameter in model.student.parameters())


def test_a_checkpoint_restores_both():
    one, two = make_distillation(ema_decay=0.5), make_distillation(ema_decay=0.5)
    for seed in range(2):
        change(one.student, seed)
        one.update_average()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    TrainedStudent(two).load_state_dict(copy.deepcopy(TrainedStudent(one).state_dict()))
    for model in (one, two):
        change(model.student, 2)
        model.update_average()
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
        assert torch.equal(one.student.state_dict()[name], two.student.state_dict()[name]), name


def test_without_a_decay_there_is_no_average():
    model = make_distillation()
    assert model.average is None and model.final_student is model.student
    # Initial weights are those of both.
    averaged = make_distillation(ema_decay=0.5)
    averaged.load_state_dict(model.state_dict())
    for student in (averaged.student, averaged.final_student):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in student.state_dict().items())
