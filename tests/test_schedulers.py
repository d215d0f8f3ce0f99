"""The schedulers against diffusers', live: whole trajectories, configurations both ways, pipelines; and seeds."""

import json
import warnings

import diffusers
import numpy as np
import pytest
import torch

import sslfast
from sslfast import schedulers
from sslfast.ops import diffusion_noise
from sslfast.schedulers import ddim, ddpm

NAMES = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]
warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


def both(name, **config):
    return getattr(schedulers, name)(**config), getattr(diffusers, name)(**config)


def model(x, t, channels=None):
    """A network that is quick and that depends on everything."""
    y = torch.tanh(1.5 * x.roll(1, -1) - 0.3 * x + 0.2 * torch.cos(torch.as_tensor(t) / 150.0)) + 0.1 * x
    return y if channels is None else torch.cat([y, torch.sigmoid(x)], 1)


def trajectory(scheduler, x, channels=None, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for t in scheduler.timesteps:
        out = scheduler.step(model(x, t, channels), t, x, generator=generator, **options)
        x = out.prev_sample
        found += [x, out.pred_original_sample] if "pred_original_sample" in out else [x]
    return found


def assert_same_trajectory(ours, theirs, x=None, tolerance=2e-5, channels=None, **options):
    """Both take each step from diffusers' sample, so that errors do not add up."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) if x is None else x
    assert torch.equal(ours.timesteps, theirs.timesteps)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for t in theirs.timesteps:
        y = model(x, t, channels)
        found, expected = (
            scheduler.step(y, t, x, generator=generator, **options)
            for scheduler, generator in zip((ours, theirs), generators, strict=True)
        )
        assert list(found) == list(expected)
        for key in expected:
            assert found[key].dtype == expected[key].dtype
            torch.testing.assert_close(found[key], expected[key], rtol=tolerance, atol=tolerance)
        x = expected.prev_sample


DDPM = {"beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]}
DDPM |= {"prediction_type": ["epsilon", "sample", "v_prediction"]}
DDPM |= {"variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]}
DDPM |= {"timestep_spacing": ["linspace", "leading", "trailing"]}
DDIM = {name: DDPM[name] for name in ("prediction_type", "timestep_spacing")}
DDIM |= {"beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"]}
OTHERS = [
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"thresholding": True, "sample_max_value": 1.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"num_train_timesteps": 200, "beta_end": 0.05},
    {"trained_betas": np.linspace(1e-3, 0.012, 1000)},
    {"steps_offset": 1},
]
ALL_DDPM = [{name: value} for name, values in DDPM.items() for value in values] + OTHERS
ALL_DDPM += [
    {"prediction_type": p, "beta_schedule": b, "clip_sample": False}
    for p in DDPM["prediction_type"]
    for b in ("linear", "squaredcos_cap_v2")
]


def config_id(config):
    return " ".join(f"{name}={'…' if name == 'trained_betas' else value}" for name, value in config.items())


@pytest.mark.parametrize("config", ALL_DDPM, ids=config_id)
@pytest.mark.parametrize("steps", [7, 50])
def test_ddpm_trajectories_equal_diffusers(config, steps):
    ours, theirs = both("DDPMScheduler", **config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    channels = 2 if config.get("variance_type", "").startswith("learned") else None
    # x0 is of any size where it is not clipped; the model keeps it near 1, and errors grow with it.
    tolerance = 2e-4 if config.get("clip_sample") is False or "thresholding" in config else 2e-5
    assert_same_trajectory(ours, theirs, channels=channels, tolerance=tolerance)


def test_ddpm_without_set_timesteps_and_with_timesteps_of_ones_own():
    ours, theirs = both("DDPMScheduler", num_train_timesteps=60)
    assert_same_trajectory(ours, theirs)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[59, 40, 39, 20, 3])
    assert_same_trajectory(ours, theirs)


def test_fixed_large_log_is_the_standard_deviation_of_fixed_large():
    """diffusers' step takes the root of a logarithm there, which is NaN."""
    found = []
    for variance_type in ("fixed_large", "fixed_large_log"):
        scheduler = schedulers.DDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(10)
        found.append(trajectory(scheduler, torch.ones(1, 3, 8, 8))[-1])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "config", [{n: v} for n, vs in DDIM.items() for v in vs] + OTHERS + [{"set_alpha_to_one": False}], ids=config_id
)
@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"eta": 0.4, "use_clipped_model_output": True}], ids=str)
def test_ddim_trajectories_equal_diffusers(config, options):
    tolerance = 2e-4 if config.get("clip_sample") is False or "thresholding" in config else 2e-5
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        ours, theirs = both("DDIMScheduler", **({"prediction_type": prediction_type} | config))
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(13)
        assert_same_trajectory(ours, theirs, tolerance=tolerance, **options)


DPM = [{"prediction_type": p, "solver_order": o} for p in DDPM["prediction_type"] for o in (1, 2, 3)]
DPM += [{"solver_type": "heun"}, {"solver_order": 3, "lower_order_final": False}, {"euler_at_final": True}]
DPM += [{"final_sigmas_type": "sigma_min", "solver_order": o} for o in (1, 2, 3)]
DPM += [{"timestep_spacing": s} for s in DDPM["timestep_spacing"]]
DPM += [{"beta_schedule": b} for b in ("scaled_linear", "squaredcos_cap_v2")]
DPM += [
    {"algorithm_type": "sde-dpmsolver++", "solver_type": s, "solver_order": o}
    for s in ("midpoint", "heun")
    for o in (1, 2)
]
DPM += [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_lu_lambdas": True}]
DPM += [{"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}, {"lambda_min_clipped": -5.1}]
DPM += [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"steps_offset": 1}]
DPM += [{"thresholding": True, "sample_max_value": 1.5}]


@pytest.mark.parametrize("config", DPM, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 9, 20])
def test_dpm_solver_trajectories_equal_diffusers(config, steps):
    ours, theirs = both("DPMSolverMultistepScheduler", **config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)  # rounded timesteps may occur twice
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-6)
    # Where sigmas begin in the thousands, x0 is a small difference of large numbers.
    assert_same_trajectory(ours, theirs, tolerance=2e-3 if ours.sigmas.max() > 1000 else 3e-4)


def test_dpm_solver_may_begin_in_the_middle():
    ours, theirs = both("DPMSolverMultistepScheduler")
    x, noise = torch.randn(2, 3, 3, 8, 8)
    for begin in (False, True):
        found = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(20)
            scheduler.timesteps = scheduler.timesteps  # as pipelines do
            if begin:
                scheduler.set_begin_index(8)
            start = scheduler.timesteps[8:]
            y = scheduler.add_noise(x, noise, start[:1].repeat(3))
            for t in start:
                y = scheduler.step(model(y, t), t, y).prev_sample
            found.append(y)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_dpm_solver_with_timesteps_of_ones_own():
    ours, theirs = both("DPMSolverMultistepScheduler")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[999, 700, 500, 200, 100, 10])
    assert_same_trajectory(ours, theirs, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_other_types_are_as_near_to_the_truth_as_diffusers(name, dtype):
    """Both in `dtype`, against diffusers' in float64; in float64 the coefficients are of float32."""
    ours, theirs = both(name)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    options = {"generator": None} if name != "DDPMScheduler" else {}
    found = []
    for scheduler, start in ((ours, x), (theirs, x), (theirs, x.double())):
        scheduler.set_timesteps(20)
        y = start
        t = scheduler.timesteps[-1]
        if name == "DPMSolverMultistepScheduler":
            scheduler.set_begin_index(19)
        out = scheduler.step(model(x, t).to(y.dtype), t, y, **options)  # the last step takes no noise
        assert out.prev_sample.dtype == start.dtype
        found.append(out.prev_sample.double())
    mine, others, truth = found
    assert (mine - truth).norm() <= max(1.1 * (others - truth).norm(), 1e-6 * truth.norm())


# ------------------------------------------------------------------------------------------------------ attributes


def test_golden_values_of_ddpm():
    scheduler = schedulers.DDPMScheduler()
    assert scheduler._get_variance(487).item() == pytest.approx(0.00979, abs=1e-5)
    assert scheduler._get_variance(999).item() == pytest.approx(0.02, abs=1e-5)
    theirs = diffusers.DDPMScheduler()
    predicted = torch.linspace(-1, 1, 5)
    for kind in DDPM["variance_type"] + ["fixed_large_log"]:
        for t in (0, 1, 500):
            actual, expected = (s._get_variance(t, predicted, kind) for s in (scheduler, theirs))
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_those_of_diffusers(name):
    ours, theirs = both(name)
    for attribute in ("betas", "alphas", "alphas_cumprod"):
        assert torch.equal(getattr(ours, attribute), getattr(theirs, attribute))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert (len(ours), ours.order, ours.init_noise_sigma) == (len(theirs), theirs.order, theirs.init_noise_sigma)
    x = torch.randn(2, 3)
    assert ours.scale_model_input(x, 5) is x
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    assert ours.config.beta_end == ours.config["beta_end"] == 0.02
    assert name in repr(ours)


@pytest.mark.parametrize("name", NAMES[:2])
def test_noising_equals_diffusers(name):
    ours, theirs = both(name, beta_schedule="squaredcos_cap_v2")
    x, noise = torch.randn(2, 5, 3, 8, 8)
    t = torch.tensor([0, 3, 500, 998, 999])
    torch.testing.assert_close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
    torch.testing.assert_close(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t))
    torch.testing.assert_close(ours.add_noise(x, noise, t[3:4]), theirs.add_noise(x, noise, t[3:4]))


@pytest.mark.parametrize("name", NAMES)
def test_configurations_go_both_ways(name, tmp_path):
    config = {"num_train_timesteps": 300, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    config |= {"timestep_spacing": "trailing", "trained_betas": [0.001 * i for i in range(1, 301)]}
    ours, theirs = both(name, **config)
    cls, their_cls = getattr(schedulers, name), getattr(diffusers, name)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["scheduler_config.json"]
    plain = {key: value for key, value in ours.config.items() if not key.startswith("_")}
    for loaded in (
        cls.from_pretrained(tmp_path / "theirs"),
        cls.from_pretrained(str(tmp_path), subfolder="ours"),
        cls.from_config(theirs.config),
        cls.from_config(ours.config),
    ):
        assert {key: loaded.config[key] for key in plain} == plain
    for loaded in (their_cls.from_pretrained(tmp_path / "ours"), their_cls.from_config(ours.config)):
        assert {key: loaded.config[key] for key in plain} == plain
    assert json.loads((tmp_path / "ours/scheduler_config.json").read_text())["_class_name"] == name
    changed, unused = cls.from_config(theirs.config, beta_end=0.5, something=1, return_unused_kwargs=True)
    assert (changed.config.beta_end, unused["something"]) == (0.5, 1)


def test_one_scheduler_from_the_configuration_of_another():
    ddpm = schedulers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    for scheduler in (
        schedulers.DDIMScheduler.from_config(ddpm.config),
        schedulers.DPMSolverMultistepScheduler.from_config(diffusers.DDPMScheduler.from_config(ddpm.config).config),
        diffusers.EulerDiscreteScheduler.from_config(ddpm.config),
    ):
        assert scheduler.config.beta_schedule == "scaled_linear"
        assert scheduler.config.prediction_type == "v_prediction"
    assert schedulers.DDIMScheduler in ddpm.compatibles


UNET = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}


@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "DDIMPipeline"])
def test_in_a_pipeline_of_diffusers(pipeline, tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**UNET)
    name = pipeline.replace("Pipeline", "Scheduler")
    images = []
    for scheduler in both(name):
        pipe = getattr(diffusers, pipeline)(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        options = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
        images.append(pipe(generator=torch.Generator().manual_seed(3), **options).images)
    np.testing.assert_allclose(*images, atol=1e-5)


def test_noise_of_diffusers_generators():
    ours, theirs = both("DDPMScheduler")
    x, out = torch.randn(2, 3, 3, 4, 4)
    found = []
    for scheduler in (ours, theirs):
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        found.append(scheduler.step(out, 500, x, generator=generators).prev_sample)
        torch.manual_seed(5)
        found.append(scheduler.step(out, 500, x, return_dict=False)[0])
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ patch


@pytest.mark.parametrize("name", NAMES[:2])
def test_patched_diffusers_gives_the_same_images(name, monkeypatch):
    calls = []
    module = ddpm if name == "DDPMScheduler" else ddim
    step = module.step
    monkeypatch.setattr(module, "step", lambda *a: calls.append(1) or step(*a))
    scheduler = getattr(diffusers, name)()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"eta": 0.5} if name == "DDIMScheduler" else {}
    for steps in (7, 11):
        scheduler.set_timesteps(steps)
        expected = trajectory(scheduler, x, **options)
        with sslfast.patch("diffusers"):
            found = trajectory(scheduler, x, **options)
            out = scheduler.step(x, scheduler.timesteps[0], x)
            assert len(scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)) == 2
        assert type(out) is type(scheduler.step(x, scheduler.timesteps[0], x))
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        assert len(calls) == steps + 2
        calls.clear()


def test_patched_diffusers_leaves_alone_what_it_cannot_do(caplog):
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    x = torch.randn(1, 3, 4, 4)
    with sslfast.patch("diffusers"), caplog.at_level("WARNING", "sslfast"):
        assert scheduler.step(x, 500, x).prev_sample.isnan().all()
    assert "fixed_large_log is NaN in diffusers" in caplog.text


# ------------------------------------------------------------------------------------------------------ seeds


def images(name, seeds, steps=12, **config):
    scheduler = getattr(schedulers, name)(**config)
    scheduler.set_timesteps(steps)
    x = scheduler.initial_noise(seeds, (3, 9, 9))
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    for t in scheduler.timesteps:
        # One image at a time, so that the model cannot be what depends on the batch.
        out = torch.cat([model(x[i : i + 1], t) for i in range(len(x))])
        x = scheduler.step(out, t, x, seeds=seeds, **options).prev_sample
    return x


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_a_function_of_its_seed(name):
    config = {"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPM") else {}
    seeds = torch.arange(64) * 12345
    together = images(name, seeds, **config)
    assert torch.equal(images(name, seeds.flip(0), **config).flip(0), together)
    for i in (0, 17, 63):
        assert torch.equal(images(name, seeds[i : i + 1], **config)[0], together[i])
    assert (together[0] - together[1]).abs().max() > 0.1


def test_seeded_noise_is_that_of_the_op():
    scheduler = schedulers.DDPMScheduler()
    x, out, seeds = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.tensor([4, 9])
    previous = scheduler.step(out, 500, x, seeds=seeds).prev_sample
    noise = diffusion_noise(seeds, (3, 8, 8), step=500)
    torch.testing.assert_close(previous, noise * scheduler._get_variance(500).sqrt())
    assert torch.equal(scheduler.initial_noise(seeds, (3, 8, 8)), diffusion_noise(seeds, (3, 8, 8), step=1000))


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_timestep_of_its_own_for_each_sample(name):
    scheduler = getattr(schedulers, name)()
    scheduler.set_timesteps(20)
    x, out = torch.randn(2, 4, 3, 8, 8)
    t, seeds = scheduler.timesteps[[0, 5, 18, 19]], torch.arange(4)
    together = scheduler.step(out, t, x, seeds=seeds)
    for i in range(4):
        alone = scheduler.step(out[i : i + 1], t[i], x[i : i + 1], seeds=seeds[i : i + 1])
        for key in together:
            assert torch.equal(alone[key][0], together[key][i])


def test_output_is_a_tuple_and_a_dict():
    scheduler = schedulers.DDPMScheduler()
    x = torch.randn(1, 3, 4, 4)
    torch.manual_seed(0)
    out = scheduler.step(x, 10, x)
    torch.manual_seed(0)
    pair = scheduler.step(x, 10, x, return_dict=False)
    assert torch.equal(out.prev_sample, out[0])
    assert torch.equal(out["pred_original_sample"], out.to_tuple()[1])
    assert all(torch.equal(a, b) for a, b in zip(out.to_tuple(), pair, strict=True))
    with pytest.raises(AttributeError):
        out.nothing  # noqa: B018


# ------------------------------------------------------------------------------------------------------ bad arguments

DPM_NAME = NAMES[2]
BAD = {
    "schedule": (NAMES[0], {"beta_schedule": "cubic"}, NotImplementedError, "beta_schedule='cubic'"),
    "schedule of DDIM": (NAMES[1], {"beta_schedule": "sigmoid"}, NotImplementedError, "'sigmoid' .* for DDIMScheduler"),
    "prediction": (NAMES[1], {"prediction_type": "x"}, ValueError, "prediction_type: expected one of .*'x'"),
    "spacing": (NAMES[0], {"timestep_spacing": "even"}, ValueError, "timestep_spacing: expected one of"),
    "steps": (NAMES[0], {"num_train_timesteps": 0}, ValueError, "num_train_timesteps: expected at least 1"),
    "betas": (NAMES[0], {"trained_betas": [[0.1]]}, ValueError, "trained_betas: expected a list of numbers"),
    "order": (DPM_NAME, {"solver_order": 4}, ValueError, "solver_order: expected one of"),
    "algorithm": (DPM_NAME, {"algorithm_type": "dpmsolver"}, NotImplementedError, "algorithm_type='dpmsolver'"),
    "flow": (DPM_NAME, {"use_flow_sigmas": True}, NotImplementedError, "use_flow_sigmas"),
    "two sigmas": (DPM_NAME, {"use_karras_sigmas": True, "use_beta_sigmas": True}, ValueError, "use_karras_sigmas"),
    "solver": (DPM_NAME, {"solver_type": "bh3"}, NotImplementedError, "solver_type='bh3'"),
    "flow prediction": (DPM_NAME, {"prediction_type": "flow_prediction"}, NotImplementedError, "flow_prediction"),
    "sde": (DPM_NAME, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, NotImplementedError, "solver_order=3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(case):
    name, config, error, message = BAD[case]
    with pytest.raises(error, match=message):
        getattr(schedulers, name)(**config)


@pytest.mark.parametrize("name", NAMES)
def test_bad_steps(name):
    scheduler = getattr(schedulers, name)()
    x = torch.randn(1, 3, 4, 4)
    wrong = (0, "at least 1, got 0") if name == DPM_NAME else (1001, "1 to num_train_timesteps = 1000, got 1001")
    with pytest.raises(ValueError, match=f"num_inference_steps: expected {wrong[1]}"):
        scheduler.set_timesteps(wrong[0])
    if name != "DDPMScheduler":
        with pytest.raises(ValueError, match="num_inference_steps: call set_timesteps"):
            scheduler.step(x, 10, x)
    scheduler.set_timesteps(10)
    if name != DPM_NAME:
        with pytest.raises(ValueError, match="timestep: expected 0 to 999, got 1000"):
            scheduler.step(x, 1000, x)
        with pytest.raises(ValueError, match=r"timestep: expected a whole number, got 99\.5"):
            scheduler.step(x, 99.5, x)
        with pytest.raises(ValueError, match=r"timestep: expected one, or one for each of 1 samples, got \(2,\)"):
            scheduler.step(x, torch.tensor([900, 800]), x, seeds=torch.arange(1))
        with pytest.raises(ValueError, match="model_output, sample: expected shapes that broadcast"):
            scheduler.step(x[:, :2], 100, x)


def test_other_bad_arguments():
    scheduler, x = schedulers.DDPMScheduler(), torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="timesteps: expected a falling list"):
        scheduler.set_timesteps(timesteps=[3, 5])
    with pytest.raises(ValueError, match="num_inference_steps: expected either"):
        scheduler.set_timesteps(10, timesteps=[5, 3])
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"timestep: expected one of scheduler.timesteps, got 5"):
        scheduler.step(x, 5, x)
    ddim = schedulers.DDIMScheduler()
    ddim.set_timesteps(10)
    with pytest.raises(ValueError, match="variance_noise: expected variance_noise or generator"):
        ddim.step(x, 100, x, eta=1.0, variance_noise=x, generator=torch.Generator())
    for generator in (torch.Generator(), torch.Generator()), []:
        with pytest.raises(ValueError, match="generator: expected one for each of 3 samples"):
            scheduler.step(x.expand(3, -1, -1, -1), 900, x.expand(3, -1, -1, -1), generator=list(generator))
