//! The backprop learner: loss and gradients of one optimiser step.

use crate::error::{Error, Result};
use retune_core::batch::Batch;
use retune_core::change::{Changes, Mode};
use retune_core::kernels::Spans;
use retune_core::method::Reference;
use retune_core::model::{Output, Tuned, cross_entropy};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::pass::{Pass, select};
use retune_core::random::Seed;
use retune_core::site::Site;
use retune_core::spec::Head;
use tensor::{Gradients, Tensor, TensorData, activation};

pub use retune_core::step::FlatGradients;

/// What one optimiser step computed before anything moved.
#[derive(Debug)]
pub struct StepResult {
    /// Mean loss per label over the whole step's batch.
    pub loss: f64,
    /// Gradient of that mean, per parameter.
    pub gradients: FlatGradients,
    /// Gradient of the distance to the base's predictions, where it was asked for.
    pub reference_gradients: FlatGradients,
    /// Tokens read.
    pub num_tokens: u64,
    /// Labels that carried a loss.
    pub num_labels: u64,
}

/// What a method wants of a step beyond the gradient of the mean loss per label.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Demands {
    /// Also the gradient of the distance to the base's predictions.
    pub reference: Option<Reference>,
    /// Each row weighs the same, however many labels it has.
    pub rows_alike: bool,
}

/// Settings of the learner.
#[derive(Debug, Clone, Copy)]
pub struct Backprop {
    /// Seed of dropout.
    pub seed: Seed,
    /// Runs each layer again in the backward pass instead of keeping its activations.
    pub recompute: bool,
}

impl Backprop {
    /// Computes the loss and gradients of one step over `micro_batches`.
    ///
    /// Each label weighs the same whatever micro-batch it lies in, so that accumulation gives the
    /// numbers of the undivided batch.
    ///
    /// # Errors
    /// [`Error::NothingToLearn`] if there is no label at all; those of the model.
    pub fn step(
        &self,
        tuned: &Tuned<'_>,
        micro_batches: &[Batch],
        step: u64,
    ) -> Result<StepResult> {
        self.step_with(tuned, micro_batches, step, &Demands::default())
    }

    /// Computes [`Backprop::step`] with what a method wants beside it.
    ///
    /// # Errors
    /// As [`Backprop::step`].
    pub fn step_with(
        &self,
        tuned: &Tuned<'_>,
        micro_batches: &[Batch],
        step: u64,
        demands: &Demands,
    ) -> Result<StepResult> {
        let head = &tuned.model.spec().head;
        let num_labels: usize = micro_batches.iter().map(|batch| batch.num_labels(head)).sum();
        if num_labels == 0 {
            return Err(Error::NothingToLearn { step: step + 1, rows: row_list(micro_batches) });
        }
        let num_rows: usize = micro_batches.iter().map(|batch| row_labels(batch, head).1).sum();
        // Labels of a prompt stand before every row that has labels of its own.
        let of_prompt = match head {
            Head::Language { .. } => tuned.changes.virtual_targets().into_iter().flatten().count(),
            _ => 0,
        };
        let num_labels = num_labels + num_rows * of_prompt;
        let empty = || tuned.parameters.iter().map(|_| None).collect::<FlatGradients>();
        let mut result = StepResult {
            loss: 0.0,
            gradients: empty(),
            reference_gradients: if demands.reference.is_some() { empty() } else { Vec::new() },
            num_tokens: 0,
            num_labels: num_labels as u64,
        };
        for (index, batch) in micro_batches.iter().enumerate() {
            result.num_tokens += batch.num_tokens() as u64;
            if batch.num_labels(head) == 0 {
                continue;
            }
            let mode = Mode::Train { seed: self.seed, pass: (step << 16) | index as u64 };
            let open = || Pass::new(tuned.weights, tuned.changes, tuned.parameters, batch, mode);
            let mut pass = open()?;
            let weighing = if demands.rows_alike {
                let labels = row_labels(batch, head).0.into_iter();
                Weighing::Rows(labels.map(|count| count + of_prompt).collect(), num_rows)
            } else {
                Weighing::Labels(num_labels)
            };
            let sink = &mut result.gradients;
            result.loss += if self.recompute {
                recomputed(tuned, &mut pass, &weighing, sink)?
            } else {
                kept(tuned, &mut pass, &weighing, sink)?
            };
            if let Some(reference) = demands.reference {
                let scale = 1.0 / num_labels as f64;
                let loss = reference_loss(tuned, &mut open()?, batch, reference)?;
                if loss.is_tracked() {
                    let gradients = loss.mul_scalar(scale).backward();
                    collect(tuned.parameters, gradients, &mut result.reference_gradients);
                }
            }
        }
        Ok(result)
    }
}

/// How the losses of single labels become one number.
enum Weighing {
    /// Each label by one over this.
    Labels(usize),
    /// Each label of row `i` by one over the row's labels (the list) and the number of rows.
    Rows(Vec<usize>, usize),
}

/// Counts the labels of each document, and the documents that have any.
fn row_labels(batch: &Batch, head: &Head) -> (Vec<usize>, usize) {
    let counts: Vec<usize> = match head {
        Head::Classes { .. } => {
            batch.classes.iter().map(|class| usize::from(class.is_some())).collect()
        }
        Head::Pairs => batch.matches().iter().map(|text| usize::from(text.is_some())).collect(),
        _ => batch
            .spans
            .iter()
            .map(|span| batch.targets[span].iter().filter(|target| target.is_some()).count())
            .collect(),
    };
    let with_labels = counts.iter().filter(|count| **count > 0).count();
    (counts, with_labels)
}

/// Sums `−p log q` over the labels of a batch, `p` of the base and `q` of the tuned model.
fn reference_loss(
    tuned: &Tuned<'_>,
    pass: &mut Pass<'_>,
    batch: &Batch,
    reference: Reference,
) -> Result<Tensor<1>> {
    let rows: Vec<usize> =
        (0..batch.targets.len()).filter(|t| batch.targets[*t].is_some()).collect();
    let labelled = row_labels(batch, &tuned.model.spec().head).0;
    let labelled: Vec<usize> = (0..labelled.len()).filter(|row| labelled[*row] > 0).collect();
    let read = |pass: &mut Pass<'_>, output: Output| match output {
        Output::States(states) => pass.logits(&states, &rows),
        Output::Classes(logits) => Ok(select(logits, &labelled)),
        Output::Pairs(pairs) => Ok(select(pairs.similarities(), &labelled)),
        Output::Embeddings(_) => Err(no_loss_on_vectors()),
    };
    let nothing = Changes::default();
    let base = Tuned { changes: &nothing, ..*tuned };
    let p = base.evaluate(batch, None, |pass, output| {
        let logits = read(pass, output)?;
        Ok(activation::softmax(logits.inner().div_scalar(reference.temperature), 1))
    })?;
    let output = tuned.model.forward(pass)?;
    let logits = read(pass, output)?.div_scalar(reference.temperature);
    Ok((activation::log_softmax(logits, 1) * p).sum().neg())
}

fn no_loss_on_vectors() -> retune_core::Error {
    retune_core::Error::Unsupported {
        what: "training on document vectors".to_owned(),
        help: "train this model as a classifier: give the data labels".to_owned(),
    }
}

/// Names the rows of a step's batch, at most 20 of them.
pub fn row_list(batches: &[Batch]) -> String {
    let rows: Vec<usize> = batches.iter().flat_map(|batch| batch.rows.iter().copied()).collect();
    let mut text = rows.iter().take(20).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if rows.len() > 20 {
        text = format!("{text} and {} more", rows.len() - 20);
    }
    text
}

/// Adds up the weighted losses of a batch's labels.
fn weighted_loss(
    pass: &mut Pass<'_>,
    output: Output,
    weighing: &Weighing,
) -> retune_core::Result<Tensor<1>> {
    let (losses, of_tokens) = match output {
        Output::States(states) => {
            if let Some(of_prompt) = pass.virtual_losses(states.clone())? {
                let own = pass.token_losses(states)?;
                let spans = (pass.batch().spans.clone(), pass.spans().clone());
                return Ok(weighted(own, weighing, Some(&spans.0))
                    + weighted(of_prompt, weighing, Some(&spans.1)));
            }
            (pass.token_losses(states)?, true)
        }
        Output::Classes(logits) => {
            let class = |class: &Option<u32>| class.map(|class| class as usize);
            let classes: Vec<_> = pass.batch().classes.iter().map(class).collect();
            (cross_entropy(logits, &classes), false)
        }
        Output::Pairs(pairs) => (pairs.losses(pass.batch()), false),
        Output::Embeddings(_) => return Err(no_loss_on_vectors()),
    };
    let spans = of_tokens.then(|| pass.batch().spans.clone());
    Ok(weighted(losses, weighing, spans.as_ref()))
}

/// Adds up losses, one for each row of the documents of `spans` or one for each document.
fn weighted(losses: Tensor<1>, weighing: &Weighing, spans: Option<&Spans>) -> Tensor<1> {
    match weighing {
        Weighing::Labels(count) => losses.sum().mul_scalar(1.0 / *count as f64),
        Weighing::Rows(labels, rows) => {
            let weight = |count: usize| 1.0 / (count.max(1) * rows) as f32;
            let weights: Vec<f32> = match spans {
                Some(spans) => {
                    let of_span = |(span, count): (std::ops::Range<usize>, &usize)| {
                        std::iter::repeat_n(weight(*count), span.len())
                    };
                    spans.iter().zip(labels).flat_map(of_span).collect()
                }
                None => labels.iter().map(|count| weight(*count)).collect(),
            };
            let count = weights.len();
            let device = losses.clone().inner().device();
            let weights = Tensor::<1>::from_data(TensorData::new(weights, [count]), &device);
            (losses * weights).sum()
        }
    }
}

/// One forward and backward pass with all activations kept.
fn kept(
    tuned: &Tuned<'_>,
    pass: &mut Pass<'_>,
    weighing: &Weighing,
    sink: &mut FlatGradients,
) -> Result<f64> {
    let output = tuned.model.forward(pass)?;
    let loss = weighted_loss(pass, output, weighing)?;
    let value = scalar(&loss);
    if loss.is_tracked() {
        collect(tuned.parameters, loss.backward(), sink);
    }
    Ok(value)
}

/// One forward pass that keeps the input of each layer only, and a backward pass that runs each
/// layer again on its own: memory of one layer's activations, at the cost of a second forward.
fn recomputed(
    tuned: &Tuned<'_>,
    pass: &mut Pass<'_>,
    weighing: &Weighing,
    sink: &mut FlatGradients,
) -> Result<f64> {
    if let Some(site) = tuned.changes.across_layers() {
        return Err(Error::Core(retune_core::Error::Unsupported {
            what: format!("running layers again one by one, with a module that ends at {site}"),
            help: "set `train.recompute` to false and allow more memory: the module's branch \
                   begins at an earlier layer"
                .to_owned(),
        }));
    }
    let model = tuned.model;
    let num_layers = model.depth();
    // The embedding's own graph is kept: its output is the first layer's input.
    let embedded = model.embed(pass)?;
    let embedded = pass.at(Site::Embedding, embedded);
    let mut inputs = vec![embedded.clone().inner()];
    for index in 0..num_layers {
        let mark = pass.mark();
        let out = model.block(pass, index, inputs[index].clone())?.inner();
        inputs.push(out);
        pass.remember(index, mark);
    }
    let last = leaf(&inputs[num_layers]);
    let output = model.finish(pass, last.clone())?;
    let loss = weighted_loss(pass, output, weighing)?;
    let value = scalar(&loss);
    let mut gradients = loss.backward();
    let mut upstream = last.grad_remove(&mut gradients);
    collect(tuned.parameters, gradients, sink);
    inputs.pop();
    let lowest = lowest_changed_layer(tuned);
    for index in (0..num_layers).rev() {
        let Some(gradient) = upstream else { return Ok(value) };
        let Some(input) = inputs.pop() else { return Ok(value) };
        // Below the lowest change nothing trains, unless the embedding does; a repeated block never
        // stands below its own number.
        if index < lowest && !embedded.is_tracked() {
            return Ok(value);
        }
        let input = leaf(&input);
        pass.recall(index);
        let out = model.block(pass, index, input.clone())?;
        let mut gradients = (out * gradient).sum().backward();
        upstream = input.grad_remove(&mut gradients);
        collect(tuned.parameters, gradients, sink);
    }
    if let Some(gradient) = upstream
        && embedded.is_tracked()
    {
        collect(tuned.parameters, (embedded * gradient).sum().backward(), sink);
    }
    Ok(value)
}

/// Returns the lowest layer with a change that trains.
fn lowest_changed_layer(tuned: &Tuned<'_>) -> usize {
    let spec = tuned.model.spec();
    // A bias that a method adds is no weight of the model; its layer is that of its module.
    let of_weights = tuned.changes.changed_weights().filter_map(|name| {
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let weight = spec.weight(name).or_else(|| spec.weight(&format!("{module}.weight")))?;
        weight.layer
    });
    let of_outputs = tuned.changes.changed_outputs().filter_map(|module| {
        spec.weight(&format!("{module}.weight")).and_then(|weight| weight.layer)
    });
    let of_states = tuned.changes.changed_layers();
    of_weights.chain(of_outputs).chain(of_states).min().unwrap_or(spec.num_layers)
}

fn leaf(x: &Tensor<2>) -> Tensor<2> {
    Tensor::from_data(x.to_data(), &x.device().autodiff()).require_grad()
}

fn scalar(loss: &Tensor<1>) -> f64 {
    f64::from(to_vec(loss.clone().inner()).first().copied().unwrap_or(f32::NAN))
}

/// Adds the gradients of one backward pass to those collected so far.
fn collect(parameters: &Parameters, mut gradients: Gradients, sink: &mut FlatGradients) {
    for ((id, parameter), slot) in parameters.iter().zip(sink) {
        if !parameter.trains {
            continue;
        }
        let Some(gradient) = parameters.take_gradient(id, &mut gradients) else { continue };
        match slot {
            None => *slot = Some(gradient),
            Some(sum) => sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g),
        }
    }
}

/// Returns the norm over all gradients together.
pub fn global_norm(gradients: &FlatGradients) -> f64 {
    let squares = gradients.iter().flatten().map(|g| retune_core::kernels::squared_norm(g));
    squares.sum::<f64>().sqrt()
}
