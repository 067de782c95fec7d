"""The registered architectures, each a declaration of its layers; their parameter counts stand in the tests."""

from __future__ import annotations

import dataclasses

from cnnlib.registry import Registry
from cnnlib.spec import NUM_CLASSES, Activation, Conv, Dense, Layer, MaxPool, Model, Norm, Padding, PerAxis, Residual

ARCHITECTURES: Registry[Model] = Registry("architecture")

RELU = Activation("relu")


def mlp(*widths: int) -> Model:
    """Fully connected layers of the given widths with ReLU between them, then the classes; no widths: logistic."""
    hidden: list[Layer] = []
    for width in widths:
        hidden += [Dense(width), RELU]
    return Model((*hidden, Dense(NUM_CLASSES)))


@ARCHITECTURES.register
def logistic() -> Model:
    """Multinomial logistic regression: one full layer from the input to the classes."""
    return mlp()


@ARCHITECTURES.register
def lenet_300_100() -> Model:
    """LeCun's two-hidden-layer net (1998, table of section III), with ReLU."""
    return mlp(300, 100)


@ARCHITECTURES.register
def mlp_75_33() -> Model:
    """LeNet-300-100's shape at LeNet-5's size: 61,723 parameters against 61,706 on 28x28x1."""
    return mlp(75, 33)


@ARCHITECTURES.register
def lenet5() -> Model:
    """LeNet-5 as it is built today (6-16-120-84): ReLU, max pooling, every map of C3 joined to every map of S2.

    LeCun (1998) used scaled tanh, trained averages and a sparse C3; this reading has 61,706 parameters on 28x28x1.
    """
    return Model(
        (
            Conv(6, 5, padding=2),
            RELU,
            MaxPool(2),
            Conv(16, 5, padding="VALID"),
            RELU,
            MaxPool(2),
            Dense(120),
            RELU,
            Dense(84),
            RELU,
            Dense(NUM_CLASSES),
        )
    )


@ARCHITECTURES.register
def two_conv() -> Model:
    """The net of the benchmarks: two 3x3 convolutions (32, 64), each pooled by 2, and a hidden layer of 128."""
    return Model(
        (
            Conv(32, 3),
            RELU,
            MaxPool(2),
            Conv(64, 3),
            RELU,
            MaxPool(2),
            Dense(128),
            RELU,
            Dense(NUM_CLASSES),
        )
    )


@ARCHITECTURES.register
def mnist1d_mlp() -> Model:
    """The MLP of MNIST-1D (Greydanus and Kobak 2024): 40-100-(residual)100-10, 15,210 parameters."""
    return Model((Dense(100), RELU, Residual((Dense(100), RELU)), Dense(NUM_CLASSES)))


@ARCHITECTURES.register
def mnist1d_cnn() -> Model:
    """The CNN of MNIST-1D (Greydanus and Kobak 2024): three strided convolutions of 25 maps, 5,210 parameters."""
    return Model(
        (
            Conv(25, 5, strides=2, padding=1),
            RELU,
            Conv(25, 3, strides=2, padding=1),
            RELU,
            Conv(25, 3, strides=2, padding=1),
            RELU,
            Dense(NUM_CLASSES),
        )
    )


def conv_relu(features: int, kernel_size: PerAxis, strides: PerAxis = 1, padding: Padding = "SAME") -> list[Layer]:
    """A convolution and its ReLU."""
    return [Conv(features, kernel_size, strides, padding), RELU]


@ARCHITECTURES.register
def alexnet_v2() -> Model:
    """AlexNet in one tower (Krizhevsky 2014), for 224x224 images: 50,303,912 parameters for 1,000 classes.

    Without dropout. Its last three layers, convolutions over the whole map in the original, are dense here.
    """
    return Model(
        (
            *conv_relu(64, 11, 4, "VALID"),
            MaxPool(3, 2),
            *conv_relu(192, 5),
            MaxPool(3, 2),
            *conv_relu(384, 3),
            *conv_relu(384, 3),
            *conv_relu(256, 3),
            MaxPool(3, 2),
            Dense(4096),
            RELU,
            Dense(4096),
            RELU,
            Dense(NUM_CLASSES),
        )
    )


@ARCHITECTURES.register
def vgg_16() -> Model:
    """VGG-16 (Simonyan and Zisserman 2015, configuration D), for 224x224 images, without dropout.

    138,357,544 parameters for 1,000 classes.
    """
    layers: list[Layer] = []
    for features, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += depth * conv_relu(features, 3) + [MaxPool(2)]
    return Model((*layers, Dense(4096), RELU, Dense(4096), RELU, Dense(NUM_CLASSES)))


def norm_relu(layer: Conv | Dense) -> list[Layer]:
    """A layer without biases, which the norm after it would take off again, the norm, and a ReLU."""
    return [dataclasses.replace(layer, use_bias=False), Norm(), RELU]


@ARCHITECTURES.register
def neyshabur_s(alpha: int = 1) -> Model:
    """The shallow family of Neyshabur (2020, arXiv 2007.13657): conv 9x9 in steps of 2 (alpha), dense (24 alpha).

    Its tables have alpha = 150; the registered one, alpha = 1, has 6,687 parameters on 32x32x3.
    """
    return Model((*norm_relu(Conv(alpha, 9, 2)), *norm_relu(Dense(24 * alpha)), Dense(NUM_CLASSES)))


@ARCHITECTURES.register
def neyshabur_d(alpha: int = 1) -> Model:
    """The deep family of Neyshabur (2020): eight 3x3 convolutions, every second in steps of 2, dense (64 alpha).

    The registered one, alpha = 1, has 7,277 parameters on 32x32x3.
    """
    layers: list[Layer] = []
    for index, width in enumerate((1, 2, 2, 4, 4, 8, 8, 16)):
        layers += norm_relu(Conv(width * alpha, 3, 1 + index % 2))
    return Model((*layers, *norm_relu(Dense(64 * alpha)), Dense(NUM_CLASSES)))
