"""Conditional diffusion: labels and captions, classifier-free and classifier guidance, text to image.

Read it with Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598), ADM (Dhariwal &
Nichol 2021, https://arxiv.org/abs/2105.05233) and GLIDE (Nichol et al. 2021, https://arxiv.org/abs/2112.10741).

    python ddpm_conditional.py                                           train on the embedded digits
    python ddpm_conditional.py --sample 30 --checkpoint runs/ddpm_conditional_digits --labels 0,3,7
    python ddpm_conditional.py --dataset stanfordcars --epochs 80        Stanford Cars by class
    python ddpm_conditional.py --dataset shapes                          text to image
    python ddpm_conditional.py --task classifier                         for --guidance classifier
"""

import support.environment  # isort: skip  # noqa: F401 (before torch)
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import ddpm
import utils
from modules import EMA, NetworkSettings, Pixels, make_network
from support import launch, runs
from support.errors import UserError, note, run_main
from support.generators import draw, seeded_generator
from support.images import to_x_0
from support.latents import settle_latent
from support.loader import hold_out
from support.machine import MachineSettings, Watched, get_device, speed_up_sampling
from support.pictures import make_grid, save_picture
from support.samples import Plan
from support.settings import COUNT, Command, flag, listed, parse, real, rows_of, setting, settings, whole
from support.text import CONDITIONS, ConditionSettings, conditions, word_codes


# 2.b Guidance makes a denoiser eps_theta(x_t, t) -> eps, or wraps one, so it works with every sampler. ----
def cfg(diffusion, net, y: Tensor, scale: float, interval=None, rescale: float = 0.0):
    """Classifier-free guidance, `eps_u + s (eps_c - eps_u)`; y (B, ...) is the condition of each image.

    Ho & Salimans 2022, eq. 6, whose w is s - 1: s = 1 is plain conditional, s = 0 unconditional. Outside an
    `interval` of t it is plain conditional (Kynkäänniemi et al. 2024); `rescale` is the phi of `rescaled`.
    """
    conditional = diffusion.denoiser(net, y)

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        # Start: 2.b classifier-free guidance (Ho & Salimans 2022, Algorithm 2)
        both = diffusion.denoiser(net, torch.cat([net.null(y), y]))  # both halves in one batch
        eps_u, eps_c = both(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
        eps = torch.lerp(eps_u, eps_c, scale)  # line 3, eq. 6: eps_u + s (eps_c - eps_u)
        # End
        return rescaled(diffusion, eps, eps_c, x_t, t, rescale) if rescale else eps

    if scale == 1:
        return conditional
    if scale == 0 and not rescale:
        guided = diffusion.denoiser(net, net.null(y))
    return guided if interval is None else within(interval, guided, conditional)


def within(interval, inside, outside):
    """The denoiser `inside` where interval[0] <= t <= interval[1], else `outside`, for each image."""

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        here = (interval[0] <= t) & (t <= interval[1])  # (B,)
        if here.all():
            return inside(x_t, t)
        if not here.any():  # so that guidance costs nothing outside its interval
            return outside(x_t, t)
        return torch.where(here.view(-1, 1, 1, 1), inside(x_t, t), outside(x_t, t))

    return eps_theta


def rescaled(diffusion, eps: Tensor, eps_c: Tensor, x_t: Tensor, t: Tensor, phi: float) -> Tensor:
    """The guided eps, with the contrast of the conditional x_0 restored in its x_0; all (B, C, H, W), t (B,).

    x_0 <- phi x_0 std(x_c) / std(x_0) + (1 - phi) x_0 for each image (Lin et al. 2023, section 3.4, on x_0).
    """
    x_0, x_c = (diffusion.x_0_from_eps(x_t, e, t) for e in (eps, eps_c))
    ratio = x_c.std((1, 2, 3), keepdim=True) / x_0.std((1, 2, 3), keepdim=True)
    return diffusion.eps_from_x_0(x_t, torch.lerp(x_0, x_0 * ratio, phi), t)


def classifier_guidance(diffusion, eps_theta, classifier, y: Tensor, scale: float):
    """`eps - sqrt(1 - alpha_bar_t) s grad log p(y | x_t)`, labels y (B,), eps_theta being unconditional.

    `classifier(x_t, t)` gives logits (B, K) (Dhariwal & Nichol 2021, Algorithm 2, and s of Algorithm 1).
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        # Start: classifier guidance (Dhariwal & Nichol 2021, Algorithm 2)
        with torch.enable_grad():  # samplers run without gradients
            x = x_t.detach().requires_grad_()
            log_p = F.log_softmax(classifier(x, t), dim=1).gather(1, y[:, None])  # (B, 1), log p(y | x_t)
            gradient = torch.autograd.grad(log_p.sum(), x)[0]  # no term depends on another image
        _, noise = diffusion.scales(t, x_t)  # sqrt(1 - alpha_bar_t)
        return eps_theta(x_t, t) - noise * scale * gradient  # eps_hat: the score moves by scale * gradient
        # End

    return guided


def dynamic_threshold(diffusion, eps_theta, quantile: float):
    """The denoiser with x_0 clamped to [-s, s] and divided by s; s >= 1 is a quantile of the image's |x_0|.

    Unlike clipping it keeps differences out of [-1, 1] (Imagen, Saharia et al. 2022, section 2.3).
    """

    def thresholded(x_t: Tensor, t: Tensor) -> Tensor:
        x_0 = diffusion.x_0_from_eps(x_t, eps_theta(x_t, t), t)
        values = x_0.abs().flatten(1).sort(dim=1).values  # (B, C H W); torch.quantile takes no large batches
        s = values[:, round(quantile * (values.shape[1] - 1))].clamp(min=1).view(-1, 1, 1, 1)
        return diffusion.eps_from_x_0(x_t, x_0.clamp(-s, s) / s, t)

    return thresholded


SCALE = "1 conditional, 0 unconditional, above 1 guided; --sample takes several: 1,3 (default: 3.0; shapes 2)"
RESCALE = "share of the conditional's contrast that is restored"
SPAN, GUIDANCE = ("LOW", "HIGH"), ("cfg", "classifier")
THRESHOLD = "scale x_0 down by this quantile of its |x_0| where that is above 1, as 0.995, before clipping"


@settings(of="task=diffusion", resume=True, sample=True)
class GuidanceSettings:  # also of the previews while training
    guidance_scale: list = setting([3.0], SCALE, "S", listed(real(0)))
    guidance_interval: list | None = setting(None, "guide only where LOW <= t <= HIGH", SPAN, COUNT, nargs=2)
    guidance_rescale: float = setting(0.0, RESCALE, "PHI", real(0, 1), of="guidance=cfg")
    dynamic_threshold: float | None = setting(None, THRESHOLD, "P", real(0, 1, above=True))


def guided_denoiser(diffusion, net, y: Tensor, scale: float, settings: GuidanceSettings, classifier=None):
    """The denoiser of the guidance settings, its condition y (B, ...) closed over."""
    interval, threshold = settings.guidance_interval, settings.dynamic_threshold
    if classifier is None:
        eps_theta = cfg(diffusion, net, y, scale, interval, settings.guidance_rescale)
    else:
        base = diffusion.denoiser(net)  # without y: the null condition
        eps_theta = classifier_guidance(diffusion, base, classifier, y, scale)
        eps_theta = within(interval, eps_theta, base) if interval else eps_theta
    return dynamic_threshold(diffusion, eps_theta, threshold) if threshold else eps_theta


def check_guidance(settings: GuidanceSettings, T: int | None = None, latent: str | None = None) -> None:
    """UserError for a scale listed twice, an interval that is not one of 1..T, or a threshold for latents."""
    scales, interval = settings.guidance_scale, settings.guidance_interval
    if len({f"{scale:g}" for scale in scales}) < len(scales):
        raise UserError("--guidance-scale lists the same scale twice")
    if interval and interval[0] > interval[1]:
        raise UserError("--guidance-interval LOW HIGH: LOW must not be above HIGH")
    if interval and T and interval[1] > T:
        raise UserError(f"--guidance-interval: t runs from 1 to {T}")
    if latent and settings.dynamic_threshold:
        raise UserError("--dynamic-threshold is for pixels, in [-1, 1], not for latents: leave it out")


# Training: a conditional denoiser, or a noise-aware classifier. -------------------------------------------
def conditional_loss(diffusion, null, p_uncond: float, net, x_0: Tensor, y: Tensor, generator=None) -> Tensor:
    """The loss; each condition y (B, ...) becomes null(y), the null condition, with probability p_uncond."""
    # Start: 2.b training step (Ho & Salimans 2022, Algorithm 1)
    # one network learns eps_c and, where the condition is dropped, eps_u
    coin = draw(torch.rand, (len(y),), y, generator)  # one for each image of the batch
    dropped = (coin < p_uncond).view(-1, *[1] * (y.ndim - 1))  # (B,), or (B, 1) for tokens
    y = torch.where(dropped, null(y), y)  # line 3: c <- null with probability p_uncond
    return diffusion.loss(net, x_0, y, generator)  # lines 4 to 7: DDPM, Algorithm 1, given y
    # End


def classifier_loss(diffusion, net, x_0: Tensor, y: Tensor, generator=None) -> Tensor:
    """The cross-entropy of p(y | x_t) over all noise levels, labels y (B,); -> scalar."""
    # Start: training step of the noise-aware classifier (Dhariwal & Nichol 2021, section 4.3)
    t = diffusion.sample_timesteps(x_0, generator)  # t ~ Uniform({1, ..., T}), one for each image
    x_t, _ = diffusion.noise_images(x_0, t, generator)  # guidance will use it on noisy images
    return F.cross_entropy(net(x_t, t).float(), y)  # -log p(y | x_t)
    # End


def conditional(command: Command, data: utils.Data, device: torch.device) -> launch.Task:
    """A UNet that learns to denoise images given their labels or captions; previews have them as rows."""
    command[TaskSettings].condition = command["condition"] or ("text" if data.labels is None else "label")
    config, guidance, name = command.config(), command[GuidanceSettings], command["dataset"]
    diffusion = ddpm.make_diffusion(config)
    settings = ddpm.settle_sampler(command, config, diffusion.T)
    check_guidance(guidance, diffusion.T, config["latent"])
    y, names, y_shown, keep = CONDITIONS[config["condition"]](data, name)
    net = make_network({**config, "kind": "ddpm_conditional", "class_names": data.class_names, **keep})
    if config["init"] and not command["resume"]:  # averaged weights of an unconditional run; the rest is new
        unet, _, init = ddpm.load_network(config["init"], kinds=("ddpm",))
        net.load_state_dict(unet.state_dict(), strict=False)
        print(f"init     from {config['init']}, epoch {init['epoch']}")
    elif config["condition"] == "label":
        # 2.a a class starts as the sum of random codes of its name's words, which related classes share
        net.label_embedding.weight.data[:-1] = word_codes(data.class_names, net.emb_dim)
    settle_scale(config["p_uncond"], command)
    shape, scale = tuple(data.images.shape[1:]), guidance.guidance_scale[0]
    space, latents = ddpm.latent_space(command, data, device) if config["latent"] else (Pixels(shape), None)
    columns = 6 if shape[-1] <= 32 else 3

    def preview(net, epoch: int, path: Path) -> None:
        numbers = torch.arange(columns).repeat(len(names))  # the same noise in every row
        y, x, how = y_shown.repeat_interleave(columns, 0), [], (space.shape, settings, config["seed"], device)
        for part in torch.arange(len(y)).split(launch.at_once(config)):
            eps_theta = guided_denoiser(diffusion, net, y[part].to(device), scale, guidance)  # 2.b
            x.append(space.decode(ddpm.sample(diffusion, eps_theta, numbers[part].tolist(), *how)))
        caption = f"{name}, epoch {epoch}, {described(settings, guidance)}, scale {scale:g}"
        save_picture(make_grid(torch.cat(x), caption, columns, rows=names), path)

    loss = partial(conditional_loss, diffusion, net.null, config["p_uncond"])  # 2.b: called with labels y
    return launch.Task("ddpm_conditional", net, loss, preview, EMA, data.images, y, keep, latents=latents)


def classification(command: Command, data: utils.Data, device: torch.device) -> launch.Task:
    """A classifier of noisy images; a tenth of them is kept back to measure its accuracy."""
    config = command.config()
    name, seed, diffusion = config["dataset"], config["seed"], ddpm.make_diffusion(config)
    if data.labels is None:
        sort = "sort its images into sub-folders, one a class, or choose another --dataset"
        raise UserError(f"data set {name} has no labels to classify by: {sort}")
    held_out, trained_on = hold_out(len(data.images), seed, "a classifier")
    x_0, y, log = to_x_0(data.images[held_out]), data.labels[held_out], []  # rows of accuracy.csv
    space, latents = ddpm.latent_space(command, data, device) if config["latent"] else (Pixels(()), None)
    x_0, latents = space.encode(x_0).cpu(), latents and (latents[0][trained_on], latents[1])

    def preview(net, epoch: int, path: Path) -> None:
        found = measure_accuracy(diffusion, net, x_0, y, launch.at_once(config), seed, device)
        log.extend((epoch, t, f"{share:.4f}") for t, share, _ in found)
        runs.log_rows(path.parent.parent / "accuracy.csv", ("t", "accuracy"), log)
        rows, x_t = [f"t = {t}: {share:.1%}" for t, share, _ in found], torch.cat([x_t for *_, x_t in found])
        tqdm.write(f"epoch {epoch}: accuracy at {', '.join(rows)}")
        caption = f"{name}, epoch {epoch}: accuracy at each noise level, on {len(x_0)} held-out images"
        save_picture(make_grid(space.decode(x_t), caption, len(x_t) // len(rows), rows), path)

    net = make_network({**config, "kind": "classifier", "class_names": data.class_names})
    use = ("--sample", 64, "--checkpoint", "RUN", "--guidance", "classifier", "--classifier")
    loss, known = partial(classifier_loss, diffusion), (data.images[trained_on], data.labels[trained_on])
    return launch.Task("classifier", net, loss, preview, EMA, *known, use=use, latents=latents)


@torch.no_grad()
def measure_accuracy(diffusion, net, x_0: Tensor, y: Tensor, batch_size: int, seed: int, device) -> list:
    """(t, share of the images x_0 (N, C, H, W) classified as y (N,), ten x_t) at eleven t of 1..T."""
    found = []
    for t in sorted({1, *(ddpm.at(100 * k, diffusion.T) for k in range(1, 11))}):
        x_t, _ = diffusion.noise_images(x_0, t, seeded_generator(seed, t))  # the same noise every epoch
        parts = (part.to(device) for part in x_t.split(batch_size))
        named = torch.cat([net(x, torch.full((len(x),), t, device=device)).argmax(1).cpu() for x in parts])
        found.append((t, (named == y).double().mean().item(), x_t[:10].clone()))
    return found


def settle_scale(p_uncond: float, command: Command | None = None) -> None:
    """A note where guidance is no use; scale 1 where the null condition was never trained."""
    if p_uncond in (0, 1):
        what = "unconditional" if p_uncond == 0 else "conditional"
        note(f"with --p-uncond {p_uncond:g} nothing {what} is learned, so guidance means nothing")
    if p_uncond == 0 and command:
        command.settle({"guidance_scale": [1.0]})


def load_classifier(path: str, model: dict, device, guides: bool = True):
    """A run of --task classifier; UserError unless it fits the model's data, and, to guide, its noise."""
    if model["kind"] == "published" or model.get("condition") == "text":
        on = "captions" if model.get("condition") == "text" else "unknown data"
        raise UserError(f"a classifier takes a model of labels; this one was trained on {on}: use cfg")
    classifier, _, theirs = ddpm.load_network(path, device, ("classifier",))
    for key in (*SAME_DATA, "noise_steps", "schedule") if guides else SAME_DATA:
        if theirs[key] != model[key]:
            what = f"--classifier {path} was trained with {flag(key)} {theirs[key]}, the model with"
            raise UserError(f"{what} {model[key]}: train one with --task classifier {flag(key)} {model[key]}")
    if theirs["class_names"] != model["class_names"]:
        raise UserError(f"--classifier {path} knows other classes than the model: train one on its data")
    scales = [(one.get("autoencoder") or {}).get("scale") for one in (theirs, model)]  # None: of pixels
    if scales[0] != (scales[1] if guides else None):  # an evaluator sees images
        of = f"the model's latents: add --latent {model.get('latent')}" if guides else "images"
        raise UserError(f"--classifier {path}: train one with --task classifier on {of}")
    return classifier.requires_grad_(False)


def described(settings: ddpm.SamplerSettings, guidance: GuidanceSettings, kind: str = "cfg") -> str:
    """The sampler and the guidance, for a caption."""
    interval = guidance.guidance_interval and "{} to {}".format(*guidance.guidance_interval)
    options = dict(interval=interval, rescale=guidance.guidance_rescale, threshold=guidance.dynamic_threshold)
    return ", ".join([f"{settings}", f"{kind} guidance", *(f"{k} {v}" for k, v in options.items() if v)])


def run_sampling(command: Command) -> None:
    """Draw --batches times --sample images from --checkpoint under conditions: a grid of each batch."""
    output, how, guidance = command[runs.OutputSettings], command[GuideSettings], command[GuidanceSettings]
    wanted, seed, device = command[ConditionSettings], command["seed"], get_device(command["device"])
    processes, each, path = launch.join_processes(device), output.sample, output.checkpoint
    kinds = ("ddpm_conditional", "ddpm") if how.guidance == "classifier" else ("ddpm_conditional",)
    net, diffusion, config = ddpm.load_network(path, device, kinds)
    settings, space = ddpm.settle_sampler(command, config, diffusion.T), config["space"]
    check_guidance(guidance, diffusion.T, config.get("latent"))
    if how.guidance == "cfg":
        settle_scale(config.get("p_uncond", 0.1), command)
    classifier = how.classifier and load_classifier(how.classifier, config, device)
    names, y = conditions(path, config, wanted)
    making = {**vars(settings), **vars(guidance), **vars(wanted), **vars(how), "sample": each, "seed": seed}
    plan = Plan(config, output, command["batch_size"], runs.made_with(making, config, net), processes, names)
    film = plan.film(diffusion.timesteps(settings.sample_steps, settings.spacing))
    speed_up_sampling(net, command[MachineSettings], device)

    def draw(numbers, bar: tqdm, scale: float) -> tuple[Tensor, list[Tensor]]:
        asked = y[[i % each % len(names) for i in numbers]].to(device)  # 2.b: the labels that were passed
        eps_theta = guided_denoiser(diffusion, net, asked, scale, guidance, classifier)  # 2.b: sampling
        eps_theta = Watched(eps_theta, diffusion.T, bar, film)
        x_0 = ddpm.sample(diffusion, eps_theta, numbers, space.shape, settings, seed, device)
        return space.decode(x_0), [space.decode(x_t) for x_t in eps_theta.kept.values()]

    columns = {scale: partial(draw, scale=scale) for scale in guidance.guidance_scale}
    one = f", scale {min(columns):g}" if len(columns) == 1 else ""
    caption = f"{runs.model_name(config)}, {described(settings, guidance, how.guidance)}{one}, seed {seed}"
    name = f"{how.guidance}_{settings.sampler}_{settings.sample_steps}_seed{seed}.png"
    plan.draw_grids(columns, caption, name, how.batches)


TASKS, KINDS = {"diffusion": conditional, "classifier": classification}, ("ddpm_conditional", "classifier")
SAME_DATA = ("dataset", "image_size", "channels")  # of a classifier and its model, or of runs to compare
DROP = "probability of dropping an image's condition, from which the unconditional is learned"
CONDITION = "condition of the network: %(choices)s (default: label where the data set has labels)"


@settings()
class TaskSettings:
    task: str = setting("diffusion", "what to train: %(choices)s", "NAME", choices=TASKS)
    condition: str | None = setting(None, CONDITION, "NAME", choices=CONDITIONS, of="task=diffusion")
    text_kernel: int = setting(7, "kernel size over words; 0: none", "N", whole(0), of="condition=text")
    p_uncond: float = setting(0.1, DROP, "P", real(0, 1), of="task=diffusion")
    init: str | None = setting(None, "unconditional run to start from", "RUN", of="task=diffusion")


@settings(sample="only")
class GuideSettings:
    batches: int = setting(1, "number of grids, of N images each", "B", COUNT)
    guidance: str = setting("cfg", "cfg (classifier-free), or classifier", "NAME", choices=GUIDANCE)
    classifier: str | None = setting(None, "run of --task classifier", "RUN", of="guidance=classifier")


GROUPS = ddpm.GROUPS | {"task": TaskSettings, "conditions": ConditionSettings}
GROUPS |= {"conditional samples": GuideSettings, "guidance (it also serves the previews)": GuidanceSettings}


def settle_init(command: Command) -> None:
    """Take --init's network and diffusion; UserError for a flag that contradicts them."""
    config = runs.load_checkpoint(command["init"], "ddpm")["config"]
    names = {*rows_of(NetworkSettings), *rows_of(ddpm.DiffusionSettings), "image_size", "channels", "latent"}
    free = {"image_size", "dropout", "weighting", "p2_gamma", "p2_k", "min_snr_gamma"}  # weights fit any size
    command.take_from({name: config[name] for name in names & set(config)}, command.typed - names | free)


def main() -> None:
    command = parse(__doc__, GROUPS)
    if not command["resume"]:
        settle_latent(command)
        own = {"digits": {"epochs": 30}, "stanfordcars": utils.FOR_CONTENT}  # ten classes take longer
        command.settle({**utils.DEFAULTS.get(command["dataset"], {}), **own.get(command["dataset"], {})})
    command.check(owners=not command["resume"])
    if command["guidance"] == "classifier" and command["classifier"] is None:
        raise UserError("--guidance classifier needs --classifier RUN, a run of --task classifier")
    if command["init"] and command["resume"]:
        raise UserError("--init is for a new run, --resume goes on with one: leave one out")
    check_guidance(command[GuidanceSettings])
    if command["sample"] is not None:
        return run_sampling(command)
    if len(command["guidance_scale"]) > 1:
        raise UserError("previews are drawn with one --guidance-scale; compare several with --sample")
    if command["init"]:
        settle_init(command)
        command.check()
        settle_latent(command)
    launch.run_training(command, utils.get_data, utils.NARROW, TASKS, ddpm.train, KINDS)


if __name__ == "__main__":
    run_main(main)
