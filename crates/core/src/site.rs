//! Named places of the forward pass where states can be changed or watched.

use std::fmt;
use std::str::FromStr;

/// Which sub-layer of a transformer block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sublayer {
    /// Self-attention.
    Attention,
    /// Attention of a decoder over the encoder's output.
    CrossAttention,
    /// The feed-forward network.
    FeedForward,
}

impl Sublayer {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Attention, "attention"),
        (Self::CrossAttention, "cross_attention"),
        (Self::FeedForward, "feed_forward"),
    ];

    /// Returns the name used in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::CrossAttention => "cross_attention",
            Self::FeedForward => "feed_forward",
        }
    }
}

/// A place of the forward pass, with a name a person can type in a recipe.
///
/// | name | state there, `[tokens, width]` unless said otherwise |
/// |---|---|
/// | `embedding` | the input embeddings |
/// | `layers.3.input` | what enters block 3 |
/// | `layers.3.attention.input` | what the sub-layer really reads (after the norm in pre-norm models) |
/// | `layers.3.attention.heads` | head outputs before the output projection, `[tokens, heads · head width]` |
/// | `layers.3.feed_forward.hidden` | the activations inside the feed-forward network, `[tokens, inner width]` |
/// | `layers.3.attention.output` | the sub-layer's result before it is added to the residual stream |
/// | `layers.3.output` | what leaves block 3 |
/// | `final` | the last hidden state, after the final norm |
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// The input embeddings.
    Embedding,
    /// What enters a block.
    LayerInput(usize),
    /// What a sub-layer reads.
    Input(usize, Sublayer),
    /// Head outputs before the output projection.
    Heads(usize, Sublayer),
    /// Activations inside a feed-forward network.
    Hidden(usize, Sublayer),
    /// A sub-layer's result before the residual addition.
    Output(usize, Sublayer),
    /// What leaves a block.
    LayerOutput(usize),
    /// The last hidden state.
    Final,
}

impl Site {
    /// Returns the block this site belongs to, if any.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Embedding | Self::Final => None,
            Self::LayerInput(layer)
            | Self::Input(layer, _)
            | Self::Heads(layer, _)
            | Self::Hidden(layer, _)
            | Self::Output(layer, _)
            | Self::LayerOutput(layer) => Some(layer),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::LayerInput(layer) => write!(f, "layers.{layer}.input"),
            Self::Input(layer, sub) => write!(f, "layers.{layer}.{}.input", sub.name()),
            Self::Heads(layer, sub) => write!(f, "layers.{layer}.{}.heads", sub.name()),
            Self::Hidden(layer, sub) => write!(f, "layers.{layer}.{}.hidden", sub.name()),
            Self::Output(layer, sub) => write!(f, "layers.{layer}.{}.output", sub.name()),
            Self::LayerOutput(layer) => write!(f, "layers.{layer}.output"),
            Self::Final => f.write_str("final"),
        }
    }
}

/// A text that names no site.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` names no site\n  expected: embedding, final, layers.N.input, layers.N.output, or layers.N.{{attention|cross_attention|feed_forward}}.{{input|heads|hidden|output}}"
)]
pub struct NotASite(pub String);

impl FromStr for Site {
    type Err = NotASite;

    fn from_str(text: &str) -> Result<Self, NotASite> {
        let wrong = || NotASite(text.to_owned());
        match text {
            "embedding" => return Ok(Self::Embedding),
            "final" => return Ok(Self::Final),
            _ => {}
        }
        let parts: Vec<&str> = text.split('.').collect();
        let layer = |n: &str| n.parse::<usize>().map_err(|_| wrong());
        match parts.as_slice() {
            ["layers", n, "input"] => Ok(Self::LayerInput(layer(n)?)),
            ["layers", n, "output"] => Ok(Self::LayerOutput(layer(n)?)),
            ["layers", n, sub, place] => {
                let (sub, _) =
                    *Sublayer::ALL.iter().find(|(_, name)| name == sub).ok_or_else(wrong)?;
                let n = layer(n)?;
                match *place {
                    "input" => Ok(Self::Input(n, sub)),
                    "heads" => Ok(Self::Heads(n, sub)),
                    "hidden" => Ok(Self::Hidden(n, sub)),
                    "output" => Ok(Self::Output(n, sub)),
                    _ => Err(wrong()),
                }
            }
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_site_is_read_back_from_its_name() {
        let sites = [
            Site::Embedding,
            Site::LayerInput(0),
            Site::Input(3, Sublayer::Attention),
            Site::Heads(11, Sublayer::CrossAttention),
            Site::Hidden(2, Sublayer::FeedForward),
            Site::Output(2, Sublayer::FeedForward),
            Site::LayerOutput(7),
            Site::Final,
        ];
        for site in sites {
            assert_eq!(site.to_string().parse(), Ok(site));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "layers", "layers.x.input", "layers.1.mlp.output", "layers.1.attention.q"]
        {
            assert!(text.parse::<Site>().is_err(), "{text}");
        }
    }
}
