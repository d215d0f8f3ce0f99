"""Our schedulers in the place of diffusers', live: random configurations, conversions among all classes, pipelines, and
what scripts do to a scheduler, to ours and to a patched one."""

import copy
import inspect
import io
import json
import logging
import pickle
import subprocess
import sys
import types
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from hypothesis import given, settings
from hypothesis import strategies as st

import sslfast
from sslfast import schedulers
from sslfast.schedulers import _fused

NAMES = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]
DDPM, DDIM, DPM = NAMES
warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers")


def theirs_and_ours(name, **config):
    return getattr(diffusers, name)(**config), getattr(schedulers, name)(**config)


def model(x, t):
    return torch.tanh(1.5 * x.roll(1, -1) - 0.3 * x + 0.2 * np.cos(float(t) / 150)) + 0.1 * x


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found, expected, tolerance=2e-5):
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ random configurations

BETAS = st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])
COMMON = {
    "num_train_timesteps": st.sampled_from([60, 250, 1000]),
    "beta_end": st.sampled_from([0.012, 0.02]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "rescale_betas_zero_snr": st.booleans(),
    "steps_offset": st.sampled_from([0, 1]),
}
CLIPPED = st.sampled_from(
    [{}, {"clip_sample_range": 0.4}, {"thresholding": True, "sample_max_value": 2.0}, {"thresholding": True}]
)
SIGMAS = ["use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"]
CONFIGS = {
    DDPM: st.fixed_dictionaries(
        {
            **COMMON,
            "beta_schedule": BETAS | st.sampled_from(["sigmoid", "laplace"]),
            "variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large", "anything"]),
        }
    ),
    DDIM: st.fixed_dictionaries({**COMMON, "beta_schedule": BETAS, "set_alpha_to_one": st.booleans()}),
    DPM: st.fixed_dictionaries(
        {
            **COMMON,
            "beta_schedule": BETAS,
            "solver_order": st.sampled_from([1, 2, 3]),
            "solver_type": st.sampled_from(["midpoint", "heun", "bh2"]),
            "lower_order_final": st.booleans(),
            "euler_at_final": st.booleans(),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        }
    ),
}


@pytest.mark.parametrize("name", NAMES[:2])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_configurations_step_as_diffusers(name, data):
    """Each step is taken from diffusers' sample; the random state is the same at the end, too."""
    config = data.draw(CONFIGS[name]) | data.draw(CLIPPED)
    theirs, ours = theirs_and_ours(name, **config)
    steps = data.draw(st.integers(1, 12))
    options = {}
    if name == DDIM:
        # With 1, diffusers takes the root of a difference of equal numbers, where one ᾱ is near 0.
        options = {"eta": data.draw(st.sampled_from([0.0, 0.3, 0.8]))}
        options["use_clipped_model_output"] = data.draw(st.booleans())
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    x = noise(2, 3, 4, 4)
    for t in theirs.timesteps:
        y = model(x, t)
        expected, found = (
            each.step(y, t, x, generator=generator, **options)
            for each, generator in zip((theirs, ours), generators, strict=True)
        )
        for a, b in zip(found.to_tuple(), expected.to_tuple(), strict=True):
            finite = b.isfinite()  # diffusers divides 0 by 0 where the last ᾱ is 0
            torch.testing.assert_close(a[finite], b[finite], rtol=2e-5, atol=2e-5)
        x = expected.prev_sample.nan_to_num(0.5, 0.5, -0.5)
    assert torch.equal(*(generator.get_state() for generator in generators))
    t = torch.tensor([0, 7])
    torch.testing.assert_close(ours.add_noise(x, y, t), theirs.add_noise(x, y, t))
    torch.testing.assert_close(ours.get_velocity(x, y, t), theirs.get_velocity(x, y, t))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_random_configurations_of_dpm_solver_step_as_diffusers(data):
    config = data.draw(CONFIGS[DPM])
    if data.draw(st.booleans()):
        config |= {"algorithm_type": "sde-dpmsolver++", "solver_order": min(config["solver_order"], 2)}
    if data.draw(st.booleans()):
        config |= {data.draw(st.sampled_from(SIGMAS)): True}
    theirs, ours = theirs_and_ours(DPM, **config)
    steps = data.draw(st.integers(1, 20))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)  # rounded timesteps may occur twice
    assert torch.equal(theirs.timesteps, ours.timesteps)
    assert torch.equal(theirs.sigmas, ours.sigmas)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    x = noise(2, 3, 4, 4)
    for t in theirs.timesteps:
        y = model(x, t)
        expected, found = (
            each.step(y, t, x, generator=generator).prev_sample
            for each, generator in zip((theirs, ours), generators, strict=True)
        )
        good = expected.isfinite()  # diffusers' float32 coefficients overflow between equal sigmas
        scale = max(1.0, expected[good].abs().max().item()) if good.any() else 1.0
        torch.testing.assert_close(found[good], expected[good], rtol=3e-4, atol=3e-4 * scale)
        x = expected.nan_to_num(0.5, 0.5, -0.5).clamp(-3, 3)
        assert (ours.step_index, ours.lower_order_nums) == (theirs.step_index, theirs.lower_order_nums)
    assert torch.equal(*(generator.get_state() for generator in generators))


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("choice", [*SIGMAS[:3], "none", "use_karras_sigmas use_lu_lambdas"])
def test_dpm_solver_visits_the_timesteps_of_diffusers(choice, beta_schedule):
    """For every number of steps: where a timestep is rounded, the last digit decides."""
    config = {"beta_schedule": beta_schedule} | {name: True for name in choice.split() if name != "none"}
    for more in ({}, {"rescale_betas_zero_snr": True}, {"final_sigmas_type": "sigma_min", "num_train_timesteps": 300}):
        theirs, ours = theirs_and_ours(DPM, **config, **more)
        for steps in range(1, 60, 7 if more else 1):
            theirs.set_timesteps(steps)
            ours.set_timesteps(steps)
            assert torch.equal(theirs.timesteps, ours.timesteps), (more, steps)
            assert torch.equal(theirs.sigmas, ours.sigmas), (more, steps)


@pytest.mark.parametrize("name", NAMES)
def test_trained_betas_of_any_number(name):
    theirs, ours = theirs_and_ours(name, trained_betas=np.array([0.1, 0.3, 0.2]))
    assert torch.equal(theirs.alphas_cumprod, ours.alphas_cumprod)
    for scheduler in (theirs, ours):
        scheduler.num_inference_steps = 1000
        scheduler.timesteps = torch.tensor([2, 1, 0])
    x = noise(1, 3, 4, 4)
    if name != DPM:
        for t in (2, 1, 0):
            found, expected = (s.step(0.5 * x, t, x, generator=torch.Generator()).prev_sample for s in (ours, theirs))
            assert_same(found, expected)
    assert json.loads(ours.to_json_string())["trained_betas"] == pytest.approx([0.1, 0.3, 0.2])
    tensor = getattr(schedulers, name)(trained_betas=torch.tensor([0.1, 0.3, 0.2]))
    assert json.loads(tensor.to_json_string())["trained_betas"] == pytest.approx([0.1, 0.3, 0.2])


# ------------------------------------------------------------------------------------------ shapes and dtypes

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_dtypes_of_results_are_those_of_diffusers(name, prediction_type):
    config = {"prediction_type": prediction_type}
    options = {"eta": 1.0} if name == DDIM else {}
    for model_dtype in DTYPES:
        for sample_dtype in DTYPES:
            found = []
            for scheduler in theirs_and_ours(name, **config):
                scheduler.set_timesteps(10)
                t, x, y = scheduler.timesteps[3], noise(2, 3, 4, 4).to(sample_dtype), noise(2, 3, 4, 4).to(model_dtype)
                out = scheduler.step(y, t, x, generator=torch.Generator().manual_seed(0), **options)
                found.append([*out.to_tuple(), scheduler.add_noise(x, y, t[None])])
                if name == DDIM:
                    found[-1] += scheduler.step(y, t, x, 1.0, variance_noise=noise(2, 3, 4, 4).double()).to_tuple()
                if name != DPM:
                    found[-1].append(scheduler.get_velocity(x, y, t[None]))
            for expected, actual in zip(*found, strict=True):
                assert actual.dtype == expected.dtype
                rough = 0.2 if {model_dtype, sample_dtype} & set(DTYPES[2:]) else 2e-5  # diffusers computes in 16 bits
                torch.testing.assert_close(actual, expected, rtol=rough, atol=rough)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_broadcast_as_in_diffusers(name):
    one, four = noise(1, 3, 4, 4, seed=1), noise(4, 3, 4, 4, seed=2)
    theirs, ours = theirs_and_ours(name)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    t = ours.timesteps[:4]
    for x, e, times in [(one, four, t), (four, one, t), (four, four, t[:1]), (one, one, t), (four, four, t[2])]:
        if times.dim() or name != DPM:  # diffusers' DPM-Solver iterates over the timesteps
            assert_same(ours.add_noise(x, e, times), theirs.add_noise(x, e, times))
        if name != DPM:
            assert_same(ours.get_velocity(x, e, times), theirs.get_velocity(x, e, times))
    for prediction_type in ("epsilon", "sample"):
        theirs, ours = theirs_and_ours(name, prediction_type=prediction_type)
        for y, x in ((one, four), (four, one)):
            found = []
            for scheduler in (ours, theirs):
                scheduler.set_timesteps(10)
                found.append(scheduler.step(y, t[0], x, generator=torch.Generator().manual_seed(0)).to_tuple())
            for a, b in zip(*found, strict=True):
                assert_same(a, b)
    with pytest.raises(ValueError, match="expected shapes that broadcast, got"):
        ours.step(noise(3, 3, 4, 4), t[0], four)


# ------------------------------------------------------------------------------------------ configurations

OTHERS = [
    kind.name
    for kind in KarrasDiffusionSchedulers
    if type(getattr(diffusers, kind.name)) is type and kind.name not in ("DPMSolverSDEScheduler",)
]
CHOSEN = {"num_train_timesteps": 500, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CHOSEN |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 1}


def plain(scheduler):
    config = dict(scheduler.config)
    return config | {"_use_default_values": sorted(config.get("_use_default_values", ()))}


def chosen_of(name, chosen):
    arguments = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: value for key, value in chosen.items() if key in arguments}


@pytest.mark.parametrize("chosen", [{}, CHOSEN], ids=["defaults", "chosen"])
@pytest.mark.parametrize("other", OTHERS)
def test_conversions_among_all_classes_are_those_of_diffusers(other, chosen, tmp_path):
    """From every class to ours, on to every other, and by files."""
    source = getattr(diffusers, other)(**chosen_of(other, chosen))
    source.save_pretrained(tmp_path / "source")
    for name in NAMES:
        their_class, our_class = getattr(diffusers, name), getattr(schedulers, name)
        theirs, ours = their_class.from_config(source.config), our_class.from_config(source.config)
        assert plain(ours) == plain(theirs)
        for target in (other, *NAMES):
            onward = getattr(diffusers, target)
            assert plain(onward.from_config(ours.config)) == plain(onward.from_config(theirs.config))
        for target in NAMES:
            onward = getattr(schedulers, target)
            assert plain(onward.from_config(ours.config)) == plain(getattr(diffusers, target).from_config(ours.config))
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        texts = [json.loads((tmp_path / who / "scheduler_config.json").read_text()) for who in ("theirs", "ours")]
        assert texts[0] == texts[1]
        if other != "DEISMultistepScheduler" or name != DPM:  # of that file diffusers makes no DPM-Solver
            files = [each.from_pretrained(tmp_path / "source") for each in (our_class, their_class)]
            assert plain(files[0]) == plain(files[1])


def test_saved_files_are_whole_or_not_there(tmp_path, monkeypatch):
    scheduler = schedulers.DDPMScheduler()
    scheduler.save_config(tmp_path)
    before = (tmp_path / "scheduler_config.json").read_text()
    (tmp_path / "link").hardlink_to(tmp_path / "scheduler_config.json")
    schedulers.DDPMScheduler(beta_end=0.5).save_config(tmp_path)
    assert (tmp_path / "link").read_text() == before  # another file took its place
    scheduler.save_config(tmp_path)
    (tmp_path / "link").unlink()
    monkeypatch.setattr(schedulers.DDPMScheduler, "to_json_string", lambda self: "\udcff")  # cannot be written
    with pytest.raises(UnicodeEncodeError):
        scheduler.save_config(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler_config.json"]
    assert (tmp_path / "scheduler_config.json").read_text() == before


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_of_diffusers_is_there(name, tmp_path):
    theirs, ours = theirs_and_ours(name)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for attribute in dir(theirs):
        if attribute.startswith("_"):
            continue
        expected, found = getattr(theirs, attribute), getattr(ours, attribute)
        if callable(expected):
            known = list(inspect.signature(found).parameters.values())
            free = {parameter.kind for parameter in known}
            for parameter in inspect.signature(expected).parameters.values():
                named = parameter.name in [each.name for each in known]
                assert named or inspect.Parameter.VAR_KEYWORD in free or inspect.Parameter.VAR_POSITIONAL in free
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(expected, found), attribute
    for key in ours.config:
        if not key.startswith("_"):
            assert getattr(ours, key) is not None or ours.config[key] is None
    ours.save_config(tmp_path)
    assert type(ours).load_config(tmp_path)["beta_end"] == 0.02
    assert type(ours).from_pretrained(tmp_path / "scheduler_config.json").config.beta_end == 0.02
    with pytest.raises(OSError, match=r"scheduler_config\.json"):
        type(ours).from_pretrained(tmp_path / "nothing")
    assert {each.__name__ for each in ours.compatibles} == {each.__name__ for each in theirs.compatibles}
    assert type(ours) in ours.compatibles
    assert isinstance(ours, diffusers.SchedulerMixin | diffusers.ConfigMixin)


# ------------------------------------------------------------------------------------------ pipelines

UNET = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}


def pipeline_of(kind, scheduler):
    torch.manual_seed(0)
    if kind == "DiTPipeline":
        transformer = diffusers.DiTTransformer2DModel(
            sample_size=4, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, in_channels=4,
            out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_elementwise_affine=False,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), scheduler)
    else:
        pipe = getattr(diffusers, kind)(unet=diffusers.UNet2DModel(**UNET), scheduler=scheduler)
    return pipe


def images_of(pipe):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)  # DiTPipeline passes no generator to the steps
    options = {"class_labels": [3, 5]} if isinstance(pipe, diffusers.DiTPipeline) else {"batch_size": 2}
    options |= {"num_inference_steps": 5, "output_type": "np"}
    return pipe(generator=torch.Generator().manual_seed(3), **options).images


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline", "DiTPipeline"])
def test_pipelines_are_saved_and_loaded_with_our_schedulers(kind, name, tmp_path):
    theirs, ours = theirs_and_ours(name, beta_schedule="squaredcos_cap_v2")
    expected = images_of(pipeline_of(kind, theirs))
    pipe = pipeline_of(kind, ours)
    np.testing.assert_allclose(images_of(pipe), expected, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler/scheduler_config.json").is_file()
    loaded = getattr(diffusers, kind).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(pipe.scheduler)
    np.testing.assert_allclose(images_of(loaded), expected, atol=1e-4)
    chosen = getattr(diffusers, kind).from_pretrained(tmp_path, scheduler=getattr(schedulers, DDPM)())
    if kind == "DDPMPipeline":
        assert type(chosen.scheduler) is schedulers.DDPMScheduler
    if kind != "DDIMPipeline":  # which makes diffusers' own DDIMScheduler of any
        assert type(loaded.scheduler) is getattr(schedulers, name)


def test_a_pipeline_for_those_who_lack_sslfast(tmp_path, monkeypatch):
    """diffusers loads our class where it was imported, and says so; converted before saving, it needs nothing."""
    pipe = pipeline_of("DDPMPipeline", schedulers.DDPMScheduler())
    pipe.save_pretrained(tmp_path / "ours")
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "theirs")
    monkeypatch.delitem(sys.modules, "sslfast.schedulers")
    with pytest.raises((ImportError, ValueError), match=r"import sslfast\.schedulers before"):
        diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert type(diffusers.DDPMPipeline.from_pretrained(tmp_path / "theirs").scheduler) is diffusers.DDPMScheduler


# ------------------------------------------------------------------------------------------ what scripts change


def set_config(**values):
    return lambda s: s.register_to_config(**values)


def set_internal(**values):
    return lambda s: setattr(s, "_internal_dict", FrozenDict({**s.config, **values}))


def set_attribute(name, change):
    return lambda s: setattr(s, name, change(getattr(s, name)))


def in_place(name, place, value):
    return lambda s: getattr(s, name).__setitem__(place, value)


CHANGES = {
    "alphas_cumprod replaced": set_attribute("alphas_cumprod", lambda a: a**2),
    "alphas_cumprod in place": lambda s: s.alphas_cumprod.mul_(0.9),
    "alphas_cumprod by .data": lambda s: s.alphas_cumprod.data.mul_(0.9),
    "alphas_cumprod by numpy": lambda s: s.alphas_cumprod.numpy().__imul__(0.9),
    "alphas_cumprod of another length": set_attribute("alphas_cumprod", lambda a: a[:950] * 0.95),
    "alphas_cumprod float64": set_attribute("alphas_cumprod", lambda a: a.double() * 0.9),
    "betas": set_attribute("betas", lambda b: b * 2),
    "alphas": set_attribute("alphas", lambda a: a * 0.9),
    "clip_sample": set_config(clip_sample=False),
    "clip_sample_range": set_config(clip_sample_range=0.3),
    "prediction_type": set_config(prediction_type="v_prediction"),
    "thresholding": set_config(thresholding=True, sample_max_value=1.5),
    "internal config": set_internal(prediction_type="sample", clip_sample=False),
    "attribute of the config": lambda s: setattr(s.config, "prediction_type", "sample"),
    "num_train_timesteps": set_config(num_train_timesteps=500),
    "timesteps replaced": set_attribute("timesteps", lambda t: torch.cat([t[:5], t[5:] // 2])),
    "timesteps in place": in_place("timesteps", 5, 333),
    "timesteps cut": set_attribute("timesteps", lambda t: t[3:]),
    "num_inference_steps": set_attribute("num_inference_steps", lambda n: 20),
}
OF_ONE = {
    DDPM: {
        "one": set_attribute("one", lambda a: a * 0.9),
        "variance_type": set_config(variance_type="fixed_large"),
        "custom_timesteps": lambda s: (setattr(s, "custom_timesteps", True), setattr(s, "num_inference_steps", None)),
        "previous timestep is t - 1": set_attribute("num_inference_steps", lambda n: None),
    },
    DDIM: {
        "final_alpha_cumprod": set_attribute("final_alpha_cumprod", lambda a: a * 0.99995),
        "final_alpha_cumprod in place": lambda s: s.final_alpha_cumprod.mul_(0.99995),
    },
    DPM: {
        "sigmas replaced": set_attribute("sigmas", lambda s: s * 0.8),
        "sigmas in place": lambda s: s.sigmas[:9].mul_(0.8),
        "solver_type": set_config(solver_type="heun"),
        "solver order": set_config(solver_order=1),
        "model_outputs": lambda s: setattr(s, "model_outputs", [0.3 * each for each in s.model_outputs]),
        "lower_order_nums": lambda s: setattr(s, "lower_order_nums", 0),
        "step index": lambda s: setattr(s, "_step_index", 6),
    },
}
CASES = [(name, change) for name in NAMES for change in (*CHANGES, *OF_ONE[name])]


def run_changed(scheduler, change, name):
    """What two steps before and three after a change give; an error's kind, where there is one."""
    torch.manual_seed(0)
    scheduler.set_timesteps(10)
    x = noise(2, 3, 4, 4)
    options = {"eta": 0.5} if name == DDIM else {}
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(model(x, t), t, x, **options).prev_sample
    change(scheduler)
    found = []
    for t in scheduler.timesteps[[2, 3, -1]]:
        out = scheduler.step(model(x, t), t, x, **options)
        found += out.to_tuple()
        x = out.prev_sample
    return found


@pytest.mark.parametrize("how", ["ours", "patched"])
@pytest.mark.parametrize(("name", "change"), CASES, ids=lambda value: value)
def test_what_a_script_changes_on_a_scheduler_is_seen(name, change, how):
    change = (CHANGES | OF_ONE[name])[change]
    theirs, ours = theirs_and_ours(name)
    expected = run_changed(copy.deepcopy(theirs), change, name)
    if how == "ours":
        found = run_changed(ours, change, name)
    elif name == DPM:
        return  # it is not patched
    else:
        with sslfast.patch("diffusers"):
            found = run_changed(theirs, change, name)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, check_dtype=True)


def test_the_correction_that_stable_diffusion_makes_is_seen():
    for theirs, ours in (theirs_and_ours(name) for name in NAMES[:2]):
        for scheduler in (theirs, ours):
            scheduler._internal_dict = FrozenDict({**scheduler.config, "clip_sample": False, "steps_offset": 1})
            scheduler.set_timesteps(5)
        assert ours.config.clip_sample is False
        assert ours.timesteps.tolist() == theirs.timesteps.tolist() == [801, 601, 401, 201, 1]


def test_the_variance_type_of_the_scheduler_and_of_its_config_are_one():
    scheduler = schedulers.DDPMScheduler()
    scheduler.variance_type = "fixed_large"
    assert scheduler.config.variance_type == "fixed_large"
    expected = schedulers.DDPMScheduler(variance_type="fixed_large")
    x = noise(1, 3, 4, 4)
    found = [s.step(x, 500, x, generator=torch.Generator()).prev_sample for s in (scheduler, expected)]
    assert torch.equal(*found)


def test_a_learned_variance_needs_a_model_that_gives_one():
    scheduler, x = schedulers.DDPMScheduler(variance_type="learned_range"), noise(1, 3, 4, 4)
    assert scheduler.step(x, 0, x).prev_sample.isfinite().all()  # the last step has no noise
    with pytest.raises(ValueError, match="model_output: expected twice the channels"):
        scheduler.step(x, 500, x)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_the_step_that_a_subclass_or_a_script_changes_is_not_ignored(name, monkeypatch):
    """Our step does not call it, and says so; a patched one leaves it to diffusers."""
    part = "convert_model_output" if name == DPM else "_get_variance"
    x = noise(1, 3, 4, 4)

    def changed(self, *args, **kwargs):
        return torch.tensor(0.5) * torch.ones(1, 3, 4, 4)

    class Subclass(getattr(schedulers, name)):
        pass

    Changed = type("Changed", (Subclass,), {part: changed})
    instance = Subclass()
    setattr(instance, part, changed)
    for scheduler in (Changed(), instance):
        scheduler.set_timesteps(10)
        with pytest.raises(NotImplementedError, match=f"step: ours does not call {part}"):
            scheduler.step(x, scheduler.timesteps[0], x)
    usual = Subclass()
    usual.set_timesteps(10)
    usual.step(x, usual.timesteps[0], x)

    def run():
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(10)
        return scheduler.step(x, scheduler.timesteps[0], x, generator=torch.Generator()).prev_sample

    monkeypatch.setattr(getattr(diffusers, name), part, changed)
    found, expected = patched_and_not(run)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_tables_do_not_grow(name):
    scheduler, x = getattr(schedulers, name)(), noise(1, 3, 4, 4)
    for steps in range(2, 12):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            scheduler.step(x, t, x, **({"eta": float(t) / 1000} if name == DDIM else {}))
    assert len(_fused._tables[scheduler]) == 1
    tables = len(_fused._tables)
    del scheduler
    assert len(_fused._tables) < tables


# ------------------------------------------------------------------------------------------ parts of DPM-Solver's step


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_parts_of_a_step_are_those_of_diffusers(prediction_type, algorithm):
    config = {"prediction_type": prediction_type, "algorithm_type": algorithm}
    for more in ({}, {"thresholding": True}, {"solver_type": "heun"}, {"variance_type": "learned"}):
        theirs, ours = theirs_and_ours(DPM, **config, **more)
        x, y, n = noise(3, 2, 3, 4, 4)
        y = torch.cat([y, y], 1) if "variance_type" in more and prediction_type == "epsilon" else y
        found = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(20)
            scheduler._step_index = 7
            x0 = scheduler.convert_model_output(y, sample=x)
            older, oldest = 0.5 * x0, 0.25 * x0.roll(1)
            found.append([x0, scheduler.dpm_solver_first_order_update(x0, sample=x, noise=n)])
            update = scheduler.multistep_dpm_solver_second_order_update
            found[-1].append(update([older, x0], sample=x, noise=n))
            found[-1].append(update([oldest, older, x0], None, None, x, noise=n))
            if algorithm == "dpmsolver++":
                update = scheduler.multistep_dpm_solver_third_order_update
                found[-1].append(update([oldest, older, x0], sample=x))
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[3])
            found[-1] += [alpha, sigma]
        for a, b in zip(*found, strict=True):
            assert_same(a, b)
    with pytest.raises(ValueError, match="sample: expected a tensor"):
        ours.convert_model_output(y)
    with pytest.raises(ValueError, match="step_index: expected the index of a step"):
        schedulers.DPMSolverMultistepScheduler().convert_model_output(x, sample=x)


def test_previous_timesteps_are_those_of_diffusers():
    theirs, ours = theirs_and_ours(DDPM)
    assert ours.previous_timestep(5000) == theirs.previous_timestep(5000) == 4999
    for options in ({"num_inference_steps": 10}, {"timesteps": [900, 500, 3]}):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(**options)
        for t in theirs.timesteps:
            for asked in (t, int(t)):
                found = ours.previous_timestep(asked)
                assert isinstance(found, torch.Tensor)
                assert found.item() == theirs.previous_timestep(asked).item()
    with pytest.raises(ValueError, match="timestep: expected one of"):
        ours.previous_timestep(4)
    ddim = theirs_and_ours(DDIM)
    assert ddim[0]._get_variance(420, 400) == ddim[1]._get_variance(420, 400)
    assert ddim[0]._get_variance(3, -17) == ddim[1]._get_variance(3, -17)


def test_results_are_outputs_of_diffusers():
    scheduler, x = schedulers.DDPMScheduler(), noise(1, 3, 4, 4)
    out = scheduler.step(x, 10, x)
    assert isinstance(out, diffusers.utils.BaseOutput)
    out.prev_sample = 2 * x
    assert torch.equal(out[0], 2 * x)
    assert torch.equal(out["prev_sample"], 2 * x)
    out["prev_sample"] = 3 * x
    assert torch.equal(out.prev_sample, 3 * x)
    assert torch.equal(out.to_tuple()[0], 3 * x)
    leaves, structure = torch.utils._pytree.tree_flatten(out)
    assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, structure).prev_sample, 3 * x)


# ------------------------------------------------------------------------------------------ pickles and copies

WAYS = {f"protocol {p}": lambda s, p=p: pickle.loads(pickle.dumps(s, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)}
WAYS |= {"copy": copy.copy, "deepcopy": copy.deepcopy}


def through_torch(scheduler):
    file = io.BytesIO()
    torch.save({"scheduler": scheduler}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["scheduler"]


WAYS["torch.save"] = through_torch


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_is_pickled_and_copied_in_the_middle_of_sampling(name, way):
    def go_on(scheduler, x, timesteps):
        torch.manual_seed(1)
        for t in timesteps:
            out = scheduler.step(model(x, t), t, x)
            x = out.prev_sample
        return x, out

    scheduler = getattr(schedulers, name)()
    scheduler.set_timesteps(8)
    x, out = go_on(scheduler, noise(1, 3, 4, 4), scheduler.timesteps[:3])
    other = WAYS[way](scheduler)
    assert type(other) is type(scheduler)
    assert plain(other) == plain(scheduler)
    found = [go_on(each, x, scheduler.timesteps[3:])[0] for each in (other, scheduler)]  # neither disturbs the other
    assert torch.equal(*found)
    again = WAYS[way](out)
    assert torch.equal(again.prev_sample, out.prev_sample)
    assert torch.equal(again[0], out[0])


# ------------------------------------------------------------------------------------------ patch


def patched_and_not(run):
    expected = run()
    with sslfast.patch("diffusers"):
        found = run()
    return found, expected


@pytest.fixture
def reasons(caplog):
    caplog.set_level(logging.WARNING, "sslfast")
    sslfast.patch.__globals__["_said"].clear()
    return caplog


FALLBACKS = {
    "batch": lambda s, x: s.step(x[:1, :2], 500, x),
    "wider model": lambda s, x: s.step(x.double(), 500, x),
    "per sample": lambda s, x: s.step(x, torch.tensor([500, 400]), x),
    "method": lambda s, x: (setattr(s, "previous_timestep", lambda t: t - 7), s.step(x, 500, x))[1],
    "bound method": lambda s, x: (
        setattr(s, "_threshold_sample", types.MethodType(lambda self, y: y / 2, s)),
        s.register_to_config(thresholding=True),
        s.step(x, 500, x),
    )[-1],
    "variance_type": lambda s, x: (setattr(s, "variance_type", "fixed_small_log"), s.step(x, 500, x))[1],
    "no timestep": lambda s, x: (s.set_timesteps(10), s.step(x, 55, x))[1],
    "strange clip": lambda s, x: (s.register_to_config(clip_sample_range=-1.0), s.step(x, 500, x))[1],
    "no generator": lambda s, x: s.step(x, 500, x, generator=7),
}


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("case", FALLBACKS)
def test_what_a_patched_step_cannot_do_is_done_as_before_with_the_same_noise(case, name, reasons):
    def run():
        scheduler, x = getattr(diffusers, name)(), noise(2, 3, 4, 4)
        if name == DDIM:
            scheduler.set_timesteps(1000)
        torch.manual_seed(3)
        try:
            found = FALLBACKS[case](scheduler, x).prev_sample
        except Exception as error:
            found = torch.tensor(len(str(error)))  # diffusers' own
        return found, torch.rand(1)

    (found, after), (expected, expected_after) = patched_and_not(run)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(after, expected_after)


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, ZeroDivisionError])
@pytest.mark.parametrize("name", NAMES[:2])
def test_a_step_of_ours_that_fails_leaves_the_generators_as_they_were(name, error, monkeypatch):
    """Whatever fails, and however late: here after the noise was drawn."""
    from sslfast.schedulers import _patched

    def fail(*args, **kwargs):
        raise error("out of memory")

    monkeypatch.setattr(_fused.ops, "diffusion_step", fail)
    scheduler, x = getattr(diffusers, name)(), noise(2, 3, 4, 4)
    scheduler.set_timesteps(10)
    step = _patched.ddpm_step if name == DDPM else _patched.ddim_step
    options = {"eta": 1.0} if name == DDIM else {}
    for generator in (None, torch.Generator().manual_seed(2), [torch.Generator().manual_seed(i) for i in range(2)]):
        every = generator if isinstance(generator, list) else [generator or torch.default_generator]
        before = [each.get_state() for each in every]
        with pytest.raises(error):
            step(scheduler, x, 500, x, generator=generator, **options)
        assert all(torch.equal(a, b.get_state()) for a, b in zip(before, every, strict=True))


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_patched_trajectory_leaves_the_random_state_of_the_original(name):
    def run():
        scheduler, x = getattr(diffusers, name)(), noise(2, 3, 4, 4)
        scheduler.set_timesteps(6)
        torch.manual_seed(3)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, **({"eta": 1.0} if name == DDIM else {})).prev_sample
        return x, torch.rand(1)

    (found, after), (expected, expected_after) = patched_and_not(run)
    assert_same(found, expected, 1e-4)
    assert torch.equal(after, expected_after)


# ------------------------------------------------------------------------------------------ without diffusers

SCRIPT = """
import json, pickle, sys, tempfile
if sys.argv[1] == "without":
    sys.modules["diffusers"] = None
import torch
import sslfast
assert "diffusers" not in sys.modules or sys.argv[1] == "without", "import sslfast imports diffusers"
NAMES = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]
found = []
for name in NAMES:
    cls = getattr(sslfast.schedulers, name)
    chosen = cls(beta_schedule="scaled_linear", prediction_type="v_prediction")
    for other in NAMES:
        there = getattr(sslfast.schedulers, other).from_config(chosen.config, steps_offset=1)
        back, unused = cls.from_config(there.config, return_unused_kwargs=True, something=3)
        for scheduler in (there, back):
            config = dict(scheduler.config)
            config["_use_default_values"] = sorted(config["_use_default_values"])
            found.append({k: repr(v) for k, v in sorted(config.items())})
        found.append(sorted(unused))
        found.append(there.to_json_string().replace(sslfast.schedulers._mixins.__name__, ""))
    folder = tempfile.mkdtemp()
    chosen.save_pretrained(folder)
    for place in (folder, folder + "/scheduler_config.json"):
        loaded = pickle.loads(pickle.dumps(cls.from_pretrained(place)))
        found.append(loaded.to_json_string())
    found.append(cls.load_config(folder) == cls.get_config_dict(folder))
    loaded.register_to_config(beta_end=0.5)
    found += [loaded.config.beta_end, loaded.config["beta_end"], loaded.beta_end, loaded.has_compatibles, repr(loaded)]
    found.append(cls in loaded.compatibles)
    loaded.set_timesteps(5)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in loaded.timesteps:
        out = loaded.step(0.5 * x, t, x, generator=torch.Generator().manual_seed(1))
        x = out.prev_sample
    out.prev_sample = 2 * x
    found += [x.flatten().tolist(), (out[0] / x).mean().item(), len(out.to_tuple()), list(out)]
    out = pickle.loads(pickle.dumps(out))
    found += [out.prev_sample.sum().item(), out["prev_sample"].sum().item(), out[:1][0].sum().item()]
    for wrong in ("loaded.nothing", "cls.from_pretrained(folder + '/nothing')", "out.nothing"):
        try: eval(wrong)
        except (AttributeError, OSError) as error: found.append(isinstance(error, OSError))
print(json.dumps(found))
"""


def test_without_diffusers_all_is_the_same():
    found = []
    for how in ("with", "without"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert found[0] == found[1]


def test_there_is_no_hub_without_diffusers():
    from sslfast.schedulers import _stand_ins

    class Plain(_stand_ins.SchedulerMixin, _stand_ins.ConfigMixin):
        @_stand_ins.register_to_config
        def __init__(self, size: int = 3):
            pass

    with pytest.raises(NotImplementedError, match="push_to_hub: expected False"):
        Plain().save_pretrained("folder", push_to_hub=True)
    assert Plain(4).config == {"size": 4, "_use_default_values": []}
    assert Plain().config._use_default_values == ["size"]


# ------------------------------------------------------------------------------------------ timesteps on a GPU


class Far(torch.Tensor):
    """A CPU tensor that looks like one on a GPU, and counts how often it is read."""

    reads = 0
    is_cpu = False

    def cpu(self):
        Far.reads += 1
        return self.as_subclass(torch.Tensor).clone()

    def item(self):
        Far.reads += 1
        return super().item()


def test_timesteps_on_a_gpu_are_read_once_and_again_when_they_changed():
    timesteps = torch.tensor([900, 500, 100]).as_subclass(Far)
    Far.reads = 0
    assert [_fused.number_of(t, timesteps) for t in (*timesteps, timesteps[1:2])] == [900, 500, 100, 500]
    assert Far.reads == 1
    timesteps[1] = 400
    assert [_fused.number_of(t, timesteps) for t in timesteps] == [900, 400, 100]
    assert Far.reads == 2
    another = timesteps[:2].clone()  # known to none but the GPU
    assert _fused.number_of(another[0], timesteps) is None
    assert Far.reads == 2
    assert _fused.number_of(another[0], timesteps, wait=True) == 900
    with torch.inference_mode():  # where changes leave no trace
        unseen = torch.tensor([900, 500]).as_subclass(Far)
        assert _fused.number_of(unseen[1], unseen) == 500
        unseen[1] = 3
        assert _fused.number_of(unseen[1], unseen) == 3


@pytest.mark.parametrize("name", NAMES)
def test_steps_on_a_device_equal_diffusers_and_do_not_wait(name, cuda_device):
    theirs, ours = theirs_and_ours(name)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6, device=cuda_device)
    x = noise(2, 3, 8, 8).to(cuda_device)
    generators = [torch.Generator(cuda_device).manual_seed(1) for _ in range(2)]
    options = {"eta": 0.5} if name == DDIM else {}
    for t in theirs.timesteps:
        y = model(x, t)
        expected = theirs.step(y, t, x, generator=generators[0], **options).prev_sample
        found = ours.step(
            y, ours.timesteps[(theirs.timesteps == t).nonzero()[0, 0]], x, generator=generators[1], **options
        )
        torch.testing.assert_close(found.prev_sample, expected, rtol=1e-4, atol=1e-4)
        x = expected
    assert torch.equal(*(generator.get_state() for generator in generators))
    ours.set_timesteps(6, device=cuda_device)
    seeds = torch.arange(2, device=cuda_device)
    for round in range(2):  # tables are made in the first
        if name == DPM:
            ours.set_timesteps(6, device=cuda_device)
        torch.cuda.set_sync_debug_mode("error" if round and name != DPM else "default")
        try:
            for t in ours.timesteps:
                x = ours.step(0.5 * x, t, x, seeds=seeds, **options).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
    t = ours.timesteps[:2].tolist()
    torch.testing.assert_close(
        ours.add_noise(x, x, torch.tensor(t)).cpu(),
        ours.add_noise(x.cpu(), x.cpu(), torch.tensor(t)),
        rtol=1e-5,
        atol=1e-5,
    )
