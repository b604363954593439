"""The networks follow the interface of `Model`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import FAMILIES, Tiny, error_of, fixed_batch, make
from torch import nn
from torch.overrides import TorchFunctionMode

from inputs import UserError
from models import Model, Output, create_model, feature_shapes, feature_widths, model_dict
from models.layers import recorded


@pytest.fixture(scope="module", params=model_dict)
def model(request):
    torch.manual_seed(0)
    return create_model(request.param, 100).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_classifier_is_the_last_layer(model, images):
    assert isinstance(model, Model)
    assert isinstance(model.classifier, nn.Linear)
    assert [m is model.classifier for m in model.modules() if isinstance(m, nn.Linear)] == [True]
    weight = model.classifier.weight.data_ptr()
    names = [key for key, value in model.state_dict().items() if value.data_ptr() == weight]
    assert names == [list(model.state_dict())[-2]]  # only the published name

    output = model(images, is_feat=True)
    assert isinstance(output, Output)
    assert torch.equal(model.classifier(output.features[-1]), output.logits)
    assert torch.equal(model(images), output.logits)


@torch.no_grad()
def test_what_else_is_asked_for_changes_nothing_else(model, images):
    plain, more = model(images, is_feat=True), model(images, is_feat=True, also=("preact", "class_maps"))
    assert (plain.preact, plain.class_maps) == ((), None)
    assert all(torch.equal(*pair) for pair in zip([*plain], [*more], strict=True) if torch.is_tensor(pair[0]))
    assert all(torch.equal(*pair) for pair in zip(plain.features, more.features, strict=True))
    assert [each.shape for each in more.preact] == [feature.shape for feature in plain.features[1:-1]]
    torch.testing.assert_close(more.class_maps.mean((2, 3)) + model.classifier.bias, plain.logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_published_names_can_be_walked(model, images):
    assert all(model.get_parameter(name) is p for name, p in model.named_parameters())
    zeros = {name: torch.zeros_like(value) for name, value in list(model.state_dict().items())[-2:]}
    assert not torch.func.functional_call(model, zeros, (images,)).any()  # the last layer was replaced
    assert model(images).any()


@torch.no_grad()
def test_returned_features_are_not_changed_in_place(model, images):
    seen = {}  # id of a tensor: (the tensor, kept so that the id stays unique; its first values)

    def remember(tensor):
        seen.setdefault(id(tensor), (tensor, tensor.clone()))

    hooks = []
    for module in list(model.modules())[1:]:  # all except the model itself
        if not isinstance(module, nn.ReLU):  # which overwrites what only it reads
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: remember(inputs[0])))
    for module in model.children():
        if list(module.children()):  # a stage
            hooks.append(module.register_forward_hook(lambda _, inputs, output: remember(output)))
    features = model(images, is_feat=True).features
    for hook in hooks:
        hook.remove()

    assert all(id(feature) in seen for feature in features)
    assert all(torch.equal(feature, seen[id(feature)][1]) for feature in features)


class OutOfPlace(TorchFunctionMode):
    """Computes the ReLUs and sums that overwrite their input in new tensors, and counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__iadd__:
            self.count += 1
            return args[0] + args[1]
        if func is F.relu and kwargs.get("inplace"):
            self.count += 1
            kwargs = {"inplace": False}
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", model_dict)
def test_what_is_computed_in_place_is_bit_equal(name):
    """All that a network returns, in training and in evaluation, and a step's gradients."""
    images, apart = torch.randn(2, 3, 16, 16), OutOfPlace()
    torch.manual_seed(0)
    model = create_model(name, 10)
    state = copy.deepcopy(model.state_dict())

    def computed(also):
        model.load_state_dict(state)
        model.zero_grad()
        trained = model.train()(images, is_feat=True, also=also)
        sum(each.square().mean() for each in (*trained.features, *trained.preact, trained.logits)).backward()
        with torch.no_grad():
            tested = model.eval()(images, is_feat=True, also=also)
        told = [[*each.features, *each.preact, each.logits] for each in (trained, tested)]
        return *told[0], *told[1], *(parameter.grad for parameter in model.parameters())

    for also in ((), ("preact", "last_map")):
        with apart:
            expected = computed(also)
        assert apart.count > 0 and all(torch.equal(*pair) for pair in zip(computed(also), expected, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_learns(name, images):
    torch.manual_seed(0)
    model = create_model(name, 10).train()
    F.cross_entropy(model(images), torch.tensor([3, 7])).backward()
    # a bias before batch norm (VGG) has no effect, so its gradient is zero up to rounding
    idle = {f"{key}.bias" for key, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert key in idle or parameter.grad.any(), key


@pytest.mark.parametrize("size", [8, 40])
@torch.no_grad()
def test_other_image_sizes(model, size):
    features, logits = model(torch.ones(1, 3, size, size), is_feat=True)
    assert logits.shape == (1, 100) and logits.isfinite().all()
    assert features[-1].shape == (1, model.classifier.in_features)


@pytest.mark.parametrize("name", ["resnet20", "ResNet50", "wrn_16_2", "vgg8", "MobileNetV2"])
def test_initialisation(name):
    torch.manual_seed(0)
    model = create_model(name, 100)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() >= 2000]
    assert convs
    for conv in convs:
        k = conv.kernel_size[0]
        assert conv.weight.std().item() == pytest.approx((2 / (k * k * conv.out_channels)) ** 0.5, rel=0.1)
        assert conv.bias is None or not conv.bias.any()
    if name in ("vgg8", "MobileNetV2"):
        assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    if name in ("vgg8", "MobileNetV2", "wrn_16_2"):
        assert not model.classifier.bias.any()


def test_unknown_name_lists_the_known():
    with pytest.raises(UserError) as error:
        create_model("resnet57", 100)
    assert "resnet57" in str(error.value)
    assert all(name in str(error.value) for name in model_dict)


class Odd(Tiny):
    """A network whose features are Tiny's, changed by a test."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def extract(self, x):
        return self.change(super().extract(x))


class Own(Model):
    """A network that defines only `extract`."""

    def __init__(self):
        super().__init__()
        self.net, self.classifier = Tiny(), nn.Linear(16, 10)

    def extract(self, x):
        return self.net.extract(x)


class Changed(Tiny):
    """A network whose `trace` is not what it computes."""

    def extract(self, x):
        return super().extract(2 * x)


class Misshapen(Tiny):
    """A network that records the wrong maps."""

    def trace(self, x, preact=None):
        return super().trace(recorded(x, preact), preact)


@pytest.mark.parametrize(
    ("model", "also", "says"),
    [
        (Own(), ["preact"], "the network Own gives no maps before the ReLU, which"),
        (Changed(), ["preact"], "the network Changed gives no maps before the ReLU"),
        (Own(), ["class_maps"], "define its `trace`, or choose another network or distiller"),
        (
            Misshapen(),
            ["preact"],
            "the maps before the ReLU of the network Misshapen have other shapes than its stages",
        ),
    ],
)
def test_what_a_network_cannot_give_is_said(model, also, says):
    assert feature_shapes(model, maps=True) == [[8, 16, 16], [16, 8, 8], [16]]
    assert says in error_of(feature_shapes, model, also=also)
    assert model.training


ONLY_POOLED = {"pooled": lambda f: f[-1:], "stem": lambda f: [f[0], f[-1]], "flat": lambda f: [f[0].flatten(1), *f[1:]]}


@pytest.mark.parametrize("distill", ["sp", "vid", "dpk"])
@pytest.mark.parametrize("features", ONLY_POOLED)
@pytest.mark.parametrize("role", ["student", "expert"])
def test_a_network_without_maps_is_refused_where_they_are_compared(distill, features, role):
    with pytest.raises(UserError, match="the network Odd has no maps of a stem and one stage or more") as error:
        make(distill=distill, **{role: Odd(ONLY_POOLED[features])})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("distill", ["kd", "dkd", "pkt", "crd", "srrl"])
def test_a_network_without_maps_serves_where_none_are_compared(distill):
    student, teacher = (Odd(ONLY_POOLED["pooled"]) for _ in range(2))
    batch = fixed_batch()
    step = make(distill=distill, student=student, expert=teacher)(batch, teacher(batch.images, is_feat=True))
    assert step.loss.isfinite()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f[:-1], r"do not end with the pooled vector \[B, 16\].*but are \[B, 8, 16, 16\], \[B, 16, 8, 8\]:"),
        (lambda f: [*f[:-1], f[-1][:, :, None, None]], r"do not end with the pooled vector.*\[B, 16, 1, 1\]:"),
        (lambda f: [*f[:-1], f[-1][:, :4]], r"do not end with the pooled vector.*\[B, 4\]:"),
        (lambda f: [], "but are no list of tensors: have `extract` return the stem, the stages and that"),
        (lambda f: f[-1], "but are no list of tensors"),
        (lambda f: {"pooled": f[-1]}, "but are no list of tensors"),
    ],
)
def test_features_that_break_the_contract_are_said(change, says):
    with pytest.raises(UserError, match=says) as error:
        feature_widths(Odd(change))
    assert "\n" not in str(error.value)


def test_a_network_without_a_classifier_is_refused():
    model = Tiny()
    model.classifier = nn.Identity()
    with pytest.raises(UserError, match="the network Tiny has no `classifier`"):
        feature_widths(model)
    del model.classifier
    with pytest.raises(UserError, match="the network Tiny has no `classifier`"):
        feature_widths(model)
