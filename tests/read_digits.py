"""Does a model of labels draw what it is asked for? A classifier of the real images names the samples.

python tests/read_digits.py DIR [DIR ...] [--dataset mnist --data-root DIR]

DIR is what `ddpm_conditional.py --sample N --out DIR` wrote; the classifier is trained here, without noise.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.errors import run_main
from support.images import to_x_0
from utils import get_data


def convolutions(channels, classes):
    def block(c_in, c_out):
        return nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)
        )

    head = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.3), nn.Linear(9 * 128, classes))
    return nn.Sequential(block(channels, 32), block(32, 64), block(64, 128), head)


def train_classifier(data, steps=1500, batch_size=64):
    """A classifier, trained on nine tenths of the images, shifted by up to a pixel, tested on the rest."""
    torch.manual_seed(0)
    x, y = to_x_0(data.images), data.labels
    order = torch.randperm(len(x))
    test, train = order.tensor_split([len(x) // 10])
    net = convolutions(x.shape[1], len(data.class_names))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        index = train[torch.randint(len(train), (batch_size,))]
        shift = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(net(x[index].roll(shift, (2, 3))), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        right = torch.cat([net(x[i]).argmax(1) == y[i] for i in test.split(500)])
    print(f"the classifier names {right.float().mean():.1%} of {len(test)} real held-out images rightly")
    return net


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--limit", type=int, default=20000)
    args = parser.parse_args()
    data = get_data(args.dataset, args.data_root, limit=args.limit)
    net = train_classifier(data)
    for folder in args.folders:
        lines = [json.loads(line) for line in open(f"{folder}/metadata.jsonl", encoding="utf-8")]
        by_scale = defaultdict(list)
        for line in lines:
            picture = np.asarray(Image.open(Path(folder) / line["file_name"]))
            x = torch.from_numpy(picture.copy()).view(*picture.shape[:2], -1).permute(2, 0, 1) / 127.5 - 1
            with torch.no_grad():
                named = data.class_names[net(x[None]).argmax().item()]
            by_scale[line["guidance_scale"]].append(named == line["text"])
        for scale, right in by_scale.items():
            print(
                f"{folder}: scale {scale:g}: {sum(right)} of {len(right)} as asked for, {np.mean(right):.1%}"
            )


if __name__ == "__main__":
    run_main(main)
