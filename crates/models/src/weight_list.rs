//! Collects the weights of an architecture in the order of the forward pass.

use retune_core::spec::{Kind, Role, WeightSpec};

/// The weights named so far.
#[derive(Debug, Default)]
pub(crate) struct WeightList(pub(crate) Vec<WeightSpec>);

impl WeightList {
    fn add(&mut self, name: String, shape: &[usize], kind: Kind, role: Role, layer: Option<usize>) {
        self.0.push(WeightSpec { name, shape: shape.to_vec(), kind, role, layer });
    }

    /// Adds a linear layer, with its bias if it has one.
    pub(crate) fn linear(
        &mut self,
        module: &str,
        shape: [usize; 2],
        bias: bool,
        role: Role,
        layer: Option<usize>,
    ) {
        self.product(module, shape, Kind::Linear { transposed: false }, bias, role, layer);
    }

    /// Adds a linear layer with bias that the checkpoint stores as `[inputs, outputs]`.
    pub(crate) fn conv1d(
        &mut self,
        module: &str,
        shape: [usize; 2],
        role: Role,
        layer: Option<usize>,
    ) {
        self.product(module, shape, Kind::Linear { transposed: true }, true, role, layer);
    }

    fn product(
        &mut self,
        module: &str,
        [outputs, inputs]: [usize; 2],
        kind: Kind,
        bias: bool,
        role: Role,
        layer: Option<usize>,
    ) {
        self.add(format!("{module}.weight"), &[outputs, inputs], kind, role, layer);
        if bias {
            self.add(format!("{module}.bias"), &[outputs], Kind::Bias, role, layer);
        }
    }

    /// Adds a norm, with its bias if it has one.
    pub(crate) fn norm(&mut self, module: &str, width: usize, bias: bool, layer: Option<usize>) {
        self.add(format!("{module}.weight"), &[width], Kind::Norm, Role::Norm, layer);
        if bias {
            self.add(format!("{module}.bias"), &[width], Kind::Bias, Role::Norm, layer);
        }
    }

    /// Adds the kernel of a convolution that steps by its own size, with its bias if it has one.
    pub(crate) fn convolution(&mut self, module: &str, shape: [usize; 4], bias: bool) {
        let name = format!("{module}.weight");
        self.add(name, &shape, Kind::Convolution, Role::Patches, None);
        if bias {
            self.add(format!("{module}.bias"), &shape[..1], Kind::Bias, Role::Patches, None);
        }
    }

    /// Adds states that are a weight themselves.
    pub(crate) fn constant(&mut self, name: &str, shape: &[usize], role: Role) {
        self.add(name.to_owned(), shape, Kind::Constant, role, None);
    }

    /// Adds an embedding.
    pub(crate) fn embedding(&mut self, module: &str, rows: usize, width: usize, role: Role) {
        self.add(format!("{module}.weight"), &[rows, width], Kind::Embedding, role, None);
    }
}
