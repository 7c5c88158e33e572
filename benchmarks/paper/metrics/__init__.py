"""The papers' metrics, by existing libraries, on local models: `METRICS` names them, `scorer.Scorer` computes them.

| metric | compared with | model: option | pictures | value | better |
|---|---|---|---|---|---|
| CLIP-I | references | CLIP ViT-B/32: `--clip` | its processor | mean cosine, projected | higher |
| CLIP-T | text | CLIP ViT-B/32: `--clip` | its processor | cosine; of 77 tokens, cuts are told | higher |
| DINO | references | DINO ViT-S/16: `--dino` | its processor | mean cosine of first tokens | higher |
| DINOv1 | references | DINO ViT-S/8: `--dino_vits8` | 256, its centre 224 | mean cosine of first tokens | higher |
| DINOv2 | references | DINOv2 ViT-S/14: `--dinov2` | its processor | mean cosine of first tokens | higher |
| PRES | references | DINO ViT-S/16: `--dino` | its processor | DINO of pictures of the class alone | lower |
| DIV | others of its prompt | AlexNet: `--alexnet` | whole | LPIPS, mean of a prompt's pairs | higher |
| LPIPS | references | AlexNet: `--alexnet` | fitted | LPIPS 0.1 of pictures from -1 to 1 | lower |
| FID | set of references | Inception: `--inception` | whole | Fréchet distance | lower |
| KID | set of references | Inception: `--inception` | whole | cubic kernel, unbiased | lower |
| FD-DINOv2 | set of references | DINOv2 ViT-S/14: `--dinov2` | its processor | Fréchet, first tokens | lower |
| SSIM | references | | fitted | window 11, sigma 1.5; RGB from 0 to 1 | higher |
| RMSE | references | | fitted | grey levels, 0 to 255 | lower |
| F1 | references | | fitted, shorter side 512 | of Canny's edges (100, 200) of RGB | higher |
| RMSE (depth) | references | Depth-Anything-V2: `--depth_model` | fitted | of maps from 0 to 255 | lower |
| MUSIQ | | of KonIQ-10k: `--musiq` | whole | 0 to 100 | higher |
| MANIQA | | of KonIQ-10k: `--maniqa` | whole, twenty crops | 0 to 1 | higher |

Fitted: the reference is scaled to cover the drawn picture's size and cut at the centre, as training pictures are. The
references of F1 and depth are what their condition was made of. Everything is of float32, distances of sets of float64.
Pillow scales where it can, whatever is installed. Cosines are kept as they are; DreamBench++ prints 100 times them. FID
depends on the number of pictures: below some thousands compare KID. DIV and LPIPS need `pip install lpips`, FID and KID
torch-fidelity, MUSIQ and MANIQA pyiqa (not for commercial use); without them their columns are left out.
"""

from benchmarks.paper.metrics.table import (
    METRICS,
    MODELS,
    PRIOR,
    Choice,
    Compares,
    Drawn,
    Metric,
    Model,
    add_options,
    choose,
    files_of,
    models_of,
)

__all__ = [
    "METRICS",
    "MODELS",
    "PRIOR",
    "Choice",
    "Compares",
    "Drawn",
    "Metric",
    "Model",
    "add_options",
    "choose",
    "files_of",
    "models_of",
]
