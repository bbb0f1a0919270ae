"""Small networks of plain torch, of kinds that the packages do not have."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_entry import Architecture


class LstmTagger(nn.Module):
    """A tag for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.tags = nn.Linear(64, 9)

    def forward(self, words: Tensor) -> Tensor:
        return self.tags(self.lstm(self.embedding(words))[0])


class RecurrentSpeech(nn.Module):
    """Convolutions over a spectrogram, then a GRU, as in Deep Speech 2."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, (11, 5), (2, 2), (5, 2)), nn.BatchNorm2d(16), nn.Hardtanh(0, 20)
        )
        self.gru = nn.GRU(16 * 10, 32, bidirectional=True, batch_first=True)
        self.letters = nn.Linear(64, 29)

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = self.convolutions(spectrogram[:, None]).permute(0, 3, 1, 2).flatten(2)
        return self.letters(self.gru(x)[0]).log_softmax(-1)


class WaveNet(nn.Module):
    """Gated, dilated, causal convolutions over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 16, 1)
        self.gates = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**power) for power in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(16, 32, 1) for _ in range(4))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(16, 64, 1))

    def forward(self, samples: Tensor) -> Tensor:
        x, total = self.first(samples), 0
        for power, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            tanh, sigmoid = gate(F.pad(x, (2**power, 0))).chunk(2, 1)
            residual, kept = skip(tanh.tanh() * sigmoid.sigmoid()).chunk(2, 1)
            x, total = x + residual, total + kept
        return self.last(total)


class KeywordSpotter(nn.Module):
    """Depthwise separable convolutions over spectrograms (DS-CNN)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 32, (10, 4), 2, (4, 1)), nn.BatchNorm2d(32), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU()]
            layers += [nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 12))

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.features(spectrogram)


class Detector(nn.Module):
    """A feature pyramid with one head for boxes and one for classes on all scales (SSD, RetinaNet)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 16, 32, 48)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in itertools.pairwise(sizes)
        )
        self.sides = nn.ModuleList(nn.Conv2d(size, 32, 1) for size in sizes[1:])
        self.classes, self.boxes = nn.Conv2d(32, 3 * 10, 3, padding=1), nn.Conv2d(32, 3 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top, found = None, []
        for x, side in zip(reversed(maps), reversed(self.sides), strict=True):
            top = side(x) if top is None else side(x) + F.interpolate(top, size=x.shape[-2:])
            found.append(top)
        return {
            "classes": torch.cat([self._flat(self.classes(one), 10) for one in found], 1),
            "boxes": torch.cat([self._flat(self.boxes(one), 4) for one in found], 1),
        }

    def _flat(self, x: Tensor, values: int) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values)


class YoloHead(nn.Module):
    """Two scales, each decoded to boxes on its grid (YOLO v3)."""

    def __init__(self) -> None:
        super().__init__()

        def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(after), nn.LeakyReLU(0.1))

        self.fine = nn.Sequential(block(3, 16, 2), block(16, 32, 2))
        self.coarse = nn.Sequential(block(32, 64, 2), block(64, 64))
        self.up = nn.Sequential(block(64, 32), nn.Upsample(scale_factor=2))
        self.heads = nn.ModuleList([nn.Conv2d(64, 3 * 15, 1), nn.Conv2d(64, 3 * 15, 1)])
        self.register_buffer("anchors", torch.tensor([[1.0, 2.0], [2.0, 2.0], [2.0, 1.0]]).view(3, 1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        joined = torch.cat((fine, self.up(coarse)), 1)
        return torch.cat([self._boxes(self.heads[0](coarse)), self._boxes(self.heads[1](joined))], 1)

    def _boxes(self, raw: Tensor) -> Tensor:
        batch, _, height, width = raw.shape
        raw = raw.view(batch, 3, 15, height, width).permute(0, 1, 3, 4, 2)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centres = raw[..., :2].sigmoid() + torch.stack((columns, rows), -1)
        boxes = torch.cat((centres, raw[..., 2:4].exp() * self.anchors, raw[..., 4:].sigmoid()), -1)
        return boxes.reshape(batch, -1, 15)


class MlpMixer(nn.Module):
    """Linear layers over channels and, transposed, over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(4))
        self.places = nn.ModuleList(self._mlp(16) for _ in range(2))
        self.channels = nn.ModuleList(self._mlp(32) for _ in range(2))
        self.classes = nn.Linear(32, 10)

    def _mlp(self, size: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for step in range(2):
            x = x + self.places[step](self.norms[2 * step](x).mT).mT
            x = x + self.channels[step](self.norms[2 * step + 1](x))
        return self.classes(x.mean(1))


class PointNet(nn.Module):
    """Layers on every point, with a learned 3 by 3 transform, then the maximum over all points."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Conv1d(3, 32, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten())
        self.matrix = nn.Linear(32, 9)
        self.points = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1))
        self.classes = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(self.transform(x)).view(-1, 3, 3) + torch.eye(3)
        return self.classes(self.points(torch.bmm(matrix, x)).amax(-1))


class VideoNet(nn.Module):
    """Three-dimensional convolutions, factored in space and time (R(2+1)D)."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv3d(3, 16, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.time = nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0))
        self.norm, self.more = nn.BatchNorm3d(16), nn.Conv3d(16, 32, 3, 2, 1)
        self.classes = nn.Linear(32, 5)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.norm(self.time(self.space(clip).relu())).relu()
        return self.classes(F.adaptive_avg_pool3d(self.more(x).relu(), 1).flatten(1))


class Recommender(nn.Module):
    """Embeddings of categories, all pairs of them multiplied (DLRM)."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.categories = nn.ModuleList(nn.Embedding(50, 16) for _ in range(4))
        self.top = nn.Sequential(nn.Linear(16 + 25, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.numbers(numbers)
        sparse = [embedding(categories[:, one]) for one, embedding in enumerate(self.categories)]
        features = torch.stack([dense, *sparse], 1)
        return self.top(torch.cat((dense, (features @ features.mT).flatten(1)), 1))


class Autoencoder(nn.Module):
    """Transposed convolutions, group normalisation and a sampled code (a variational one)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, 2, 1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1)
        )

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, deviation = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + (deviation / 2).exp() * noise), mean, deviation


def _spectrograms() -> tuple[Tensor, ...]:
    return (torch.randn(4, 20, 24),)


ZOO = {
    "lstm_tagger": Architecture(LstmTagger, lambda: (torch.randint(0, 100, (2, 12)),)),
    "gru_speech": Architecture(RecurrentSpeech, _spectrograms),
    "wavenet": Architecture(WaveNet, lambda: (torch.randn(2, 1, 64),)),
    "keyword_spotter": Architecture(KeywordSpotter, lambda: (torch.randn(4, 1, 49, 10),)),
    "ssd_pyramid": Architecture(Detector, lambda: (torch.randn(4, 3, 32, 32),)),
    "yolo_grid": Architecture(YoloHead, lambda: (torch.randn(4, 3, 32, 32),)),
    "mlp_mixer": Architecture(MlpMixer, lambda: (torch.randn(2, 3, 32, 32),)),
    "pointnet": Architecture(PointNet, lambda: (torch.randn(4, 3, 40),)),
    "video_3d": Architecture(VideoNet, lambda: (torch.randn(2, 3, 4, 16, 16),)),
    "dlrm": Architecture(Recommender, lambda: (torch.randn(4, 8), torch.randint(0, 50, (4, 4)))),
    "autoencoder": Architecture(Autoencoder, lambda: (torch.randn(2, 3, 32, 32), torch.randn(2, 8, 8, 8))),
}
