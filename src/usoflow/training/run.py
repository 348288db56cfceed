"""The stages of training, in order: what `usoflow train STAGE` runs.

render    fetch the drawings, render the sprites, write a contact sheet
vae       train the autoencoder, fold its latent statistics
base      cache latents, train text encoders and transformer
large     train them further on larger pictures
guided    distil guidance into the transformer
tower     train the vision tower that USO's projector reads
redraw    teach a copy of the base to draw a given picture anew: the LoRA's teacher
reward    train the style encoder of style reward learning
content   train the encoder of content reward
style     train the projector on the frozen base
subject   train the LoRA beside the frozen projector
rewarded  train it further, for both rewards
package   write the files
judge     train the encoder that measures, used for nothing else
evaluate  measure the base's modules on the fixed prompt list
uso-judge train the encoder that `usoflow evaluate` measures with
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from usoflow.training import uso_stages
from usoflow.training.stages import Workshop

STAGES: Mapping[str, Callable[[Workshop], object]] = MappingProxyType(
    {
        "render": Workshop.render,
        "vae": Workshop.vae,
        "base": Workshop.base,
        "large": Workshop.large,
        "guided": Workshop.guided,
        "tower": uso_stages.tower,
        "redraw": uso_stages.redraw,
        "reward": uso_stages.reward,
        "content": uso_stages.content,
        "style": uso_stages.style,
        "subject": uso_stages.subject,
        "rewarded": uso_stages.rewarded,
        "package": uso_stages.package_all,
        "judge": Workshop.judge,
        "evaluate": Workshop.evaluate,
        "uso-judge": uso_stages.uso_judge,
    }
)
