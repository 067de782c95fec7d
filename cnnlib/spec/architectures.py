"""The registered architectures. Each function returns one architecture. The tests check the parameter counts."""

from __future__ import annotations

import dataclasses

from cnnlib.spec.layers import NUM_CLASSES, Activation, Conv, Dense, Layer, MaxPool, Norm, Residual
from cnnlib.spec.model import Model
from cnnlib.spec.window import Padding, PerAxis
from cnnlib.system.registry import Registry

ARCHITECTURES: Registry[Model] = Registry("architecture")

RELU = Activation("relu")


def mlp(*widths: int) -> Model:
    """Return one dense layer and one ReLU per width, then a dense layer to the classes.

    Without `widths`, the model is logistic regression.
    """
    hidden: list[Layer] = []
    for width in widths:
        hidden += [Dense(width), RELU]
    return Model((*hidden, Dense(NUM_CLASSES)))


@ARCHITECTURES.register
def logistic() -> Model:
    """Multinomial logistic regression: one dense layer from the input to the classes."""
    return mlp()


@ARCHITECTURES.register
def lenet_300_100() -> Model:
    """LeCun's network with hidden layers of 300 and 100 units (1998, table of section III). The activation is ReLU."""
    return mlp(300, 100)


@ARCHITECTURES.register
def mlp_75_33() -> Model:
    """An MLP with two hidden layers. On 28x28x1, it has 61,723 parameters, almost as many as LeNet-5 (61,706)."""
    return mlp(75, 33)


@ARCHITECTURES.register
def lenet5() -> Model:
    """LeNet-5 in its usual modern form. The layers have 6, 16, 120 and 84 features or units.

    It uses ReLU and max pooling, and its second convolution sees all 6 maps of the first. LeCun (1998) used scaled tanh
    and average pooling with trained scales, and most maps of his second convolution saw only some of the 6 maps. This
    version has 61,706 parameters on 28x28x1.
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
    """The benchmark network: two 3x3 convolutions of 32 and 64 features, then 128 hidden units.

    A 2x2 max pooling follows each convolution.
    """
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
    """The MLP of MNIST-1D (Greydanus and Kobak 2024). It has 15,210 parameters.

    Two hidden layers have 100 units each. A residual adds the input of the second hidden layer to its output.
    """
    return Model((Dense(100), RELU, Residual((Dense(100), RELU)), Dense(NUM_CLASSES)))


@ARCHITECTURES.register
def mnist1d_cnn() -> Model:
    """The CNN of MNIST-1D (Greydanus and Kobak 2024): three convolutions of 25 features. It has 5,210 parameters."""
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
    """Return a convolution and a ReLU."""
    return [Conv(features, kernel_size, strides, padding), RELU]


@ARCHITECTURES.register
def alexnet_v2() -> Model:
    """AlexNet in one tower (Krizhevsky 2014), for 224x224 images.

    It has 50,303,912 parameters for 1,000 classes and no dropout. Its last three layers are dense. In the original,
    they are convolutions over the whole map.
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
    """VGG-16 without dropout (Simonyan and Zisserman 2015, configuration D), for 224x224 images.

    It has 138,357,544 parameters for 1,000 classes.
    """
    layers: list[Layer] = []
    for features, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += depth * conv_relu(features, 3) + [MaxPool(2)]
    return Model((*layers, Dense(4096), RELU, Dense(4096), RELU, Dense(NUM_CLASSES)))


def norm_relu(layer: Conv | Dense) -> list[Layer]:
    """Return `layer` without biases, a norm, and a ReLU. Biases would have no effect: the norm subtracts them."""
    return [dataclasses.replace(layer, use_bias=False), Norm(), RELU]


@ARCHITECTURES.register
def neyshabur_s(alpha: int = 1) -> Model:
    """The shallow family of Neyshabur (2020, arXiv 2007.13657): one 9x9 convolution, then `24 * alpha` hidden units.

    The convolution has stride 2 and `alpha` features. The paper's tables use alpha = 150. The registered model has
    alpha = 1 and 6,687 parameters on 32x32x3.
    """
    return Model((*norm_relu(Conv(alpha, 9, 2)), *norm_relu(Dense(24 * alpha)), Dense(NUM_CLASSES)))


@ARCHITECTURES.register
def neyshabur_d(alpha: int = 1) -> Model:
    """The deep family of Neyshabur (2020): eight 3x3 convolutions, then `64 * alpha` hidden units.

    Every second convolution has stride 2. The registered model has alpha = 1 and 7,277 parameters on 32x32x3.
    """
    layers: list[Layer] = []
    for index, width in enumerate((1, 2, 2, 4, 4, 8, 8, 16)):
        layers += norm_relu(Conv(width * alpha, 3, 1 + index % 2))
    return Model((*layers, *norm_relu(Dense(64 * alpha)), Dense(NUM_CLASSES)))
