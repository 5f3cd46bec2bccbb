//! Turns a struct with a forward and a backward function over CPU slices into an autodiff node.

use std::array;
use std::fmt::Debug;
use std::marker::PhantomData;

use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use burn_backend::tensor::FloatTensor;
use burn_backend::{AutodiffBackend, Bytes, DType, Shape};
use burn_dispatch::{
    BackendTensor, DispatchAutodiffContext, DispatchDevice, DispatchTensor, DispatchTensorKind,
    GradientCheckpointingStrategy,
};
use burn_flex::{Flex, FlexTensor, Layout};
use tensor::Tensor;

type Tracked = FloatTensor<Autodiff<Flex>>;

/// Describes a differentiable operation on `N` contiguous `f32` tensors of the CPU backend.
///
/// The value itself holds the options (an epsilon, a scale, spans); it is cloned into the graph.
pub trait Operation<const N: usize>: Clone + Debug + Send + 'static {
    /// What the backward pass needs; dropped at once when no input is tracked.
    type Saved: Clone + Debug + Send + 'static;

    /// Computes the output.
    ///
    /// `wanted[i]` tells whether a gradient for input `i` will be asked for, so that nothing is
    /// computed or kept that nobody needs. Inputs are contiguous: [`values`] reads them.
    fn forward(&self, inputs: [FlexTensor; N], wanted: [bool; N]) -> (FlexTensor, Self::Saved);

    /// Computes the gradients of the inputs from that of the output.
    ///
    /// Position `i` must be `Some` where `wanted[i]`, and should be `None` elsewhere.
    fn backward(
        &self,
        saved: Self::Saved,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// Tells whether the fast paths take this tensor: on the CPU backend and in `f32`.
pub fn is_fast<const D: usize>(tensor: &Tensor<D>) -> bool {
    fn on_flex(device: &DispatchDevice) -> bool {
        match device {
            DispatchDevice::Flex(_) => true,
            DispatchDevice::Autodiff(device) => on_flex(device),
            #[allow(unreachable_patterns, reason = "other backends are behind features")]
            _ => false,
        }
    }
    tensor.dtype() == DType::F32 && on_flex(tensor.device().as_dispatch())
}

/// Runs an operation and records it where an input is tracked.
///
/// Inputs without autodiff are constants beside inputs with it. The output has autodiff where one
/// of the inputs has, and is tracked where one of them is.
///
/// # Panics
/// When an input is not a float tensor of the CPU backend; ask [`is_fast`] first.
pub fn apply<O: Operation<N>, const N: usize>(
    operation: O,
    inputs: [DispatchTensor; N],
) -> DispatchTensor {
    let context = inputs
        .iter()
        .fold(DispatchAutodiffContext::Disabled, |context, input| context.merge(input.autodiff));
    match context {
        DispatchAutodiffContext::Disabled => {
            let inputs = inputs.map(|input| contiguous(untracked(input.kind)));
            let (output, _) = operation.forward(inputs, [false; N]);
            from_constant(output)
        }
        DispatchAutodiffContext::Enabled(strategy) => {
            let inputs = inputs.map(|input| lifted(input.kind));
            let output = match strategy {
                GradientCheckpointingStrategy::Disabled => {
                    record::<O, NoCheckpointing, N>(operation, inputs)
                }
                GradientCheckpointingStrategy::Balanced => {
                    record::<O, BalancedCheckpointing, N>(operation, inputs)
                }
            };
            let inner = DispatchTensorKind::Flex(BackendTensor::Autodiff(output));
            DispatchTensor {
                kind: DispatchTensorKind::Autodiff(Box::new(inner)),
                autodiff: context,
            }
        }
    }
}

/// Reads the numbers of a contiguous `f32` tensor.
///
/// # Panics
/// When the tensor is not contiguous or not `f32`; the tensors an [`Operation`] is given are both.
pub fn values(tensor: &FlexTensor) -> &[f32] {
    match tensor.as_slice() {
        Some(values) => values,
        None => unreachable!("an operation is only handed contiguous f32 tensors"),
    }
}

/// Makes a tensor out of numbers in row-major order.
pub fn from_values(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    let shape = shape.into();
    debug_assert_eq!(values.len(), shape.num_elements());
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}

/// The node kept in the graph; the operation itself travels in the state.
struct Node<O, const N: usize>(PhantomData<fn() -> O>);

impl<O, const N: usize> Debug for Node<O, N> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Node")
    }
}

impl<O: Operation<N>, const N: usize> Backward<Flex, N> for Node<O, N> {
    type State = (O, O::Saved);

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (operation, saved) = ops.state;
        let gradient = contiguous(gradients.consume::<Flex>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let found = operation.backward(saved, gradient, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            match (parent, gradient) {
                (Some(parent), Some(gradient)) => gradients.register::<Flex>(parent.id, gradient),
                (Some(_), None) => unreachable!("{operation:?} gave no gradient though asked"),
                (None, _) => {}
            }
        }
    }
}

fn record<O: Operation<N>, C: CheckpointStrategy, const N: usize>(
    operation: O,
    inputs: [Tracked; N],
) -> Tracked {
    let wanted = inputs.each_ref().map(Tracked::is_tracked);
    let nodes = inputs.each_ref().map(Tracked::node);
    let inputs = inputs.map(|input| contiguous(input.into_primitive()));
    // Compute bound: what backward needs is in the state, so nothing is ever recomputed for it.
    match Node::<O, N>(PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(preparation) => {
            let (output, saved) = operation.forward(inputs, wanted);
            preparation.finish((operation, saved), output)
        }
        OpsKind::UnTracked(preparation) => {
            let (output, _) = operation.forward(inputs, wanted);
            preparation.finish(output)
        }
    }
}

/// Gives the numbers of a tensor without autodiff, contiguous.
///
/// # Panics
/// When it is not a float tensor of the CPU backend; ask [`is_fast`] first.
pub(crate) fn constant(tensor: DispatchTensor) -> FlexTensor {
    contiguous(untracked(tensor.kind))
}

/// Makes a tensor without autodiff.
pub(crate) fn from_constant(tensor: FlexTensor) -> DispatchTensor {
    DispatchTensor {
        kind: DispatchTensorKind::Flex(BackendTensor::Float(tensor)),
        autodiff: DispatchAutodiffContext::Disabled,
    }
}

fn untracked(kind: DispatchTensorKind) -> FlexTensor {
    match kind {
        DispatchTensorKind::Flex(BackendTensor::Float(tensor)) => tensor,
        other => unreachable!("expected a float tensor of the CPU backend, got {other:?}"),
    }
}

fn lifted(kind: DispatchTensorKind) -> Tracked {
    let DispatchTensorKind::Autodiff(inner) = kind else {
        return <Autodiff<Flex> as AutodiffBackend>::from_inner(untracked(kind));
    };
    match *inner {
        DispatchTensorKind::Flex(BackendTensor::Autodiff(tensor)) => tensor,
        other => unreachable!("expected a float tensor of the CPU backend, got {other:?}"),
    }
}

fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.layout().contiguous_offsets().is_some() { tensor } else { tensor.to_contiguous() }
}

/// Gives an array of `None`, for operations whose inputs nobody wants a gradient of.
pub fn no_gradients<const N: usize>() -> [Option<FlexTensor>; N] {
    array::from_fn(|_| None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::Device;

    /// `2 · a · b`, refusing to compute what nobody wants.
    #[derive(Clone, Debug)]
    struct TwiceProduct;

    impl Operation<2> for TwiceProduct {
        type Saved = [FlexTensor; 2];

        fn forward(&self, inputs: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, Self::Saved) {
            let [a, b] = &inputs;
            let product = values(a).iter().zip(values(b)).map(|(a, b)| 2.0 * a * b).collect();
            (from_values(product, a.layout().shape().clone()), inputs)
        }

        fn backward(
            &self,
            [a, b]: Self::Saved,
            gradient: FlexTensor,
            wanted: [bool; 2],
        ) -> [Option<FlexTensor>; 2] {
            let times = |other: &FlexTensor| {
                let product =
                    values(&gradient).iter().zip(values(other)).map(|(g, o)| 2.0 * g * o).collect();
                from_values(product, other.layout().shape().clone())
            };
            [wanted[0].then(|| times(&b)), wanted[1].then(|| times(&a))]
        }
    }

    fn twice_product(a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
        let inputs = [a.clone().into_dispatch(), b.clone().into_dispatch()];
        Tensor::from_dispatch(apply(TwiceProduct, inputs))
    }

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().unwrap()
    }

    #[test]
    fn plain_inputs_give_a_plain_output() {
        let device = Device::flex();
        let a = Tensor::<2>::from_floats([[1.0, 2.0], [3.0, 4.0]], &device);
        let b = Tensor::<2>::from_floats([[5.0, 6.0], [7.0, 8.0]], &device);
        let out = twice_product(&a, &b);
        assert!(!out.is_autodiff());
        assert_eq!(numbers(out), [10.0, 24.0, 42.0, 64.0]);
    }

    #[test]
    fn autodiff_inputs_that_nobody_tracks_give_an_untracked_output() {
        let device = Device::flex().autodiff();
        let a = Tensor::<2>::from_floats([[1.0, 2.0]], &device);
        let out = twice_product(&a, &a);
        assert!(out.is_autodiff() && !out.is_tracked());
    }

    #[test]
    fn constants_stand_beside_tracked_inputs_in_any_layout() {
        let plain = Tensor::<2>::from_floats([[1.0, 2.0], [3.0, 4.0]], &Device::flex());
        for device in
            [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()]
        {
            let x = Tensor::<2>::from_floats([[5.0, 6.0], [7.0, 8.0]], &device).require_grad();
            let out = twice_product(&plain.clone().transpose(), &x.clone().transpose());
            assert!(out.is_tracked());
            assert_eq!(numbers(out.clone()), [10.0, 42.0, 24.0, 64.0]);
            let gradients = out.sum().backward();
            assert_eq!(numbers(x.grad(&gradients).unwrap()), [2.0, 4.0, 6.0, 8.0]);
        }
    }

    #[test]
    fn one_tensor_twice_gets_both_gradients() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::from_floats([[3.0]], &device).require_grad();
        let gradients = twice_product(&x, &x).sum().backward();
        assert_eq!(numbers(x.grad(&gradients).unwrap()), [12.0]);
    }

    #[test]
    fn only_f32_on_the_cpu_backend_is_fast() {
        let single = Tensor::<1>::zeros([2], &Device::flex());
        assert!(is_fast(&single));
        assert!(is_fast(&single.clone().autodiff()));
        assert!(!is_fast(&single.cast(tensor::DType::F64)));
    }
}
