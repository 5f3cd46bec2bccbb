//! Retrieval of short passages: made texts, an encoder that scores queries against passages, ranks.

use std::collections::BTreeMap;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::to_vec;
use retune_core::pass::Pass;
use retune_core::random::Seed;
use retune_core::spec::{Head, ModelSpec};
use retune_train::training::{BatchSource, Validation};
use tensor::Tensor;

use crate::encoder::{Encoder, Sizes};

/// Values of each fact.
const VALUES: usize = 45;

/// Facts of an entity: place, trade, year.
const FACTS: usize = 3;

/// Words of a text, so that all are as long.
const LENGTH: usize = 9;

/// Words that carry no fact.
const FILLERS: usize = 24;

/// Names of entities.
const NAMES: usize = 200;

const FIRST_NAME: usize = FILLERS;
const FIRST_VALUE: usize = FIRST_NAME + NAMES;
/// Each value has a second word, which the base has never read.
const FIRST_SYNONYM: usize = FIRST_VALUE + FACTS * VALUES;

/// Words of the vocabulary.
const WORDS: usize = FIRST_SYNONYM + FACTS * VALUES;

/// Queries of a batch.
pub(crate) const QUERIES: usize = 32;

/// Passages of a query: the one that answers it, and those that share one fact only.
const PASSAGES: usize = 4;

/// Scores are divided by this.
const TEMPERATURE: f64 = 0.05;

/// Passages about entities, and queries about two of their facts.
#[derive(Debug)]
pub(crate) struct Corpus {
    passages: Vec<Document>,
    facts: Vec<[usize; FACTS]>,
    /// For each query, the two facts it asks for and the one passage that has both.
    queries: Vec<([usize; 2], usize)>,
}

impl Corpus {
    /// Makes passages, and the queries that exactly one of them answers, in a random order.
    pub(crate) fn make(count: usize, seed: Seed) -> Self {
        let mut random = seed.stream("corpus", &[]);
        let facts: Vec<[usize; FACTS]> =
            (0..count).map(|_| std::array::from_fn(|_| random.below(VALUES))).collect();
        let passage = |(row, facts): (usize, &[usize; FACTS])| {
            let mut random = seed.stream("passage", &[row as u64]);
            let mut order = [0, 1, 2];
            random.shuffle(&mut order);
            let mut tokens = vec![FIRST_NAME + random.below(NAMES)];
            for fact in order {
                // One filler says which fact follows, another is any.
                tokens.extend([fact, FIRST_VALUE + fact * VALUES + facts[fact]]);
            }
            tokens.resize_with(LENGTH, || FACTS + random.below(FILLERS - FACTS));
            text(tokens, row)
        };
        let passages = facts.iter().enumerate().map(passage).collect();
        let mut queries = Vec::new();
        for pair in [[0, 1], [0, 2], [1, 2]] {
            let mut with: BTreeMap<[usize; 2], Vec<usize>> = BTreeMap::new();
            for (row, facts) in facts.iter().enumerate() {
                with.entry(pair.map(|fact| facts[fact])).or_default().push(row);
            }
            let single = with.values().filter(|rows| rows.len() == 1);
            queries.extend(single.map(|rows| (pair, rows[0])));
        }
        random.shuffle(&mut queries);
        Self { passages, facts, queries }
    }

    /// Returns how many queries there are.
    pub(crate) fn num_queries(&self) -> usize {
        self.queries.len()
    }

    /// Writes a query: with the passages' own words, or with the other word of each value.
    fn query(&self, number: usize, paraphrased: bool, seed: Seed) -> Document {
        let (pair, row) = self.queries[number];
        let mut random = seed.stream("query", &[number as u64]);
        let mut pair = pair;
        random.shuffle(&mut pair);
        let first = if paraphrased { FIRST_SYNONYM } else { FIRST_VALUE };
        let mut tokens: Vec<usize> =
            pair.iter().map(|fact| first + fact * VALUES + self.facts[row][*fact]).collect();
        tokens.resize_with(LENGTH, || FACTS + random.below(FILLERS - FACTS));
        random.shuffle(&mut tokens);
        text(tokens, row)
    }

    /// Draws passages that share one of a query's two facts, not both.
    fn hard(&self, number: usize, seed: Seed, step: u64) -> Vec<usize> {
        let (pair, row) = self.queries[number];
        let own = self.facts[row];
        let shared = |other: &usize| {
            pair.iter().filter(|fact| self.facts[*other][**fact] == own[**fact]).count() == 1
        };
        let mut candidates: Vec<usize> = (0..self.facts.len()).filter(shared).collect();
        seed.stream("hard", &[step, number as u64]).shuffle(&mut candidates);
        candidates.truncate(PASSAGES - 1);
        candidates
    }
}

fn text(tokens: Vec<usize>, row: usize) -> Document {
    let tokens: Vec<u32> = tokens.into_iter().map(|token| token as u32).collect();
    Document { learn: vec![false; tokens.len()], tokens, row, ..Document::default() }
}

/// Batches of queries with their passages behind them.
#[derive(Debug)]
pub(crate) struct Questions<'a> {
    pub(crate) corpus: &'a Corpus,
    /// Numbers of the queries to learn from.
    pub(crate) queries: &'a [usize],
    pub(crate) paraphrased: bool,
    pub(crate) seed: Seed,
}

impl BatchSource for Questions<'_> {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        let count = self.queries.len();
        let mut order: Vec<usize> = self.queries.to_vec();
        let per_pass = count / QUERIES;
        let pass = step as usize / per_pass;
        self.seed.stream("order", &[pass as u64]).shuffle(&mut order);
        let first = step as usize % per_pass * QUERIES;
        let chosen = &order[first..first + QUERIES];
        let mut documents: Vec<Document> = chosen
            .iter()
            .map(|number| self.corpus.query(*number, self.paraphrased, self.seed))
            .collect();
        // Passages the batch has once: a second copy of an answer would count as wrong.
        let mut rows: Vec<usize> =
            chosen.iter().map(|query| self.corpus.queries[*query].1).collect();
        let answers = rows.clone();
        rows.sort_unstable();
        rows.dedup();
        for number in chosen {
            for row in self.corpus.hard(*number, self.seed, step) {
                // Nor may a passage that answers one query stand as a wrong one of another.
                if !rows.contains(&row) {
                    rows.push(row);
                }
            }
        }
        for (document, answer) in documents.iter_mut().zip(&answers) {
            document.class = rows.iter().position(|row| row == answer).map(|at| at as u32);
        }
        documents.extend(rows.iter().map(|row| self.corpus.passages[*row].clone()));
        Ok(vec![Batch::new(&documents)?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        (steps as usize * QUERIES) as f64 / self.queries.len() as f64
    }
}

/// An encoder of texts whose class logits are a query's scores with the passages of its batch.
#[derive(Debug)]
pub(crate) struct BiEncoder {
    encoder: Encoder,
    spec: Arc<ModelSpec>,
}

impl BiEncoder {
    /// Makes it.
    pub(crate) fn new(sizes: Sizes) -> Self {
        let encoder = Encoder::new(WORDS, LENGTH, sizes, None);
        let mut spec = ModelSpec::clone(encoder.spec());
        // The number of passages differs from batch to batch; this many there may be.
        let most = QUERIES * PASSAGES;
        spec.head = Head::Classes { labels: (0..most).map(|class| class.to_string()).collect() };
        spec.weights.retain(|weight| weight.module() != "head");
        Self { encoder, spec: Arc::new(spec) }
    }
}

impl Model for BiEncoder {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> retune_core::Result<Tensor<2>> {
        self.encoder.embed(pass)
    }

    fn layer(
        &self,
        pass: &mut Pass<'_>,
        index: usize,
        x: Tensor<2>,
    ) -> retune_core::Result<Tensor<2>> {
        self.encoder.layer(pass, index, x)
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> retune_core::Result<Output> {
        let (documents, width) = (pass.spans().documents(), self.spec.width);
        let x = self.encoder.finish(pass, x)?.rows();
        let tokens = x.dims()[0] / documents;
        let means = x.reshape([documents, tokens, width]).mean_dim(1).reshape([documents, width]);
        let length = means.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(1e-12);
        let vectors = means / length;
        if pass.batch().classes.iter().all(Option::is_none) {
            return Ok(Output::Embeddings(vectors));
        }
        let passages = vectors.clone().narrow(0, QUERIES, documents - QUERIES);
        Ok(Output::Classes(vectors.matmul(passages.transpose()).div_scalar(TEMPERATURE)))
    }
}

/// Watches the mean reciprocal rank of the answers, at most 10, over all passages.
#[derive(Debug)]
pub(crate) struct Ranks<'a> {
    pub(crate) corpus: &'a Corpus,
    pub(crate) queries: &'a [usize],
    pub(crate) paraphrased: bool,
    pub(crate) seed: Seed,
    /// What was found at each look.
    pub(crate) curve: Vec<f64>,
}

impl Ranks<'_> {
    /// Measures a model.
    ///
    /// # Errors
    /// Those of the model.
    pub(crate) fn mrr(&self, tuned: &Tuned<'_>) -> retune_core::Result<f64> {
        let queries: Vec<Document> = self
            .queries
            .iter()
            .map(|number| self.corpus.query(*number, self.paraphrased, self.seed))
            .collect();
        let width = tuned.model.spec().width;
        let passages = vectors(tuned, &self.corpus.passages)?;
        let mut total = 0.0;
        for (query, number) in vectors(tuned, &queries)?.chunks_exact(width).zip(self.queries) {
            let score =
                |passage: &[f32]| query.iter().zip(passage).map(|(a, b)| a * b).sum::<f32>();
            let scores: Vec<f32> = passages.chunks_exact(width).map(score).collect();
            let answer = scores[self.corpus.queries[*number].1];
            let rank = 1 + scores.iter().filter(|score| **score > answer).count();
            total += if rank <= 10 { 1.0 / rank as f64 } else { 0.0 };
        }
        Ok(total / self.queries.len() as f64)
    }
}

fn vectors(tuned: &Tuned<'_>, documents: &[Document]) -> retune_core::Result<Vec<f32>> {
    let mut out = Vec::new();
    for some in documents.chunks(256) {
        out.extend(
            tuned.evaluate(&Batch::new(some)?, None, |_, output| {
                Ok(to_vec(output.rows().inner()))
            })?,
        );
    }
    Ok(out)
}

impl Validation for Ranks<'_> {
    fn measure(&mut self, tuned: &Tuned<'_>) -> retune_train::Result<BTreeMap<String, f64>> {
        let found = self.mrr(tuned)?;
        self.curve.push(found);
        Ok(BTreeMap::from([("loss".to_owned(), -found), ("mrr@10".to_owned(), found)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_passage_answers_a_query() {
        let corpus = Corpus::make(300, Seed(1));
        for (pair, row) in &corpus.queries {
            let own = corpus.facts[*row];
            let answers = corpus.facts.iter().filter(|f| pair.iter().all(|p| f[*p] == own[*p]));
            assert_eq!(answers.count(), 1);
        }
        let queries: Vec<usize> = (0..64).collect();
        let mut source =
            Questions { corpus: &corpus, queries: &queries, paraphrased: true, seed: Seed(2) };
        let batch = source.micro_batches(0).unwrap().remove(0);
        let passages: Vec<usize> = batch.rows[QUERIES..].to_vec();
        for (query, class) in batch.classes[..QUERIES].iter().enumerate() {
            assert_eq!(passages[class.unwrap() as usize], batch.rows[query]);
        }
        let mut once = passages.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), passages.len());
    }
}
