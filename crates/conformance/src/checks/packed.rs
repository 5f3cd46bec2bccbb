//! Documents together and alone.

use retune_core::batch::Batch;
use retune_core::spec::Head;

use crate::case::{Case, Failed, close};
use crate::suite::Check;

/// A document gives the same output whatever lies beside it.
pub const CHECK: Check = Check {
    name: "packing",
    about: "documents laid end to end give the outputs of each alone",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let mut attached = case.attach()?;
    attached.stir();
    let documents = case.subject.documents("packed", &[6, 3, 9]);
    let together = Batch::new(&documents)?;
    let all = case.outputs(&attached, &together)?;
    let by_token = matches!(case.subject.spec().head, Head::Language { .. });
    let rows = if by_token { together.num_tokens() } else { documents.len() };
    let width = all.len() / rows;
    for (place, document) in documents.iter().enumerate() {
        let alone = case.outputs(&attached, &Batch::new(std::slice::from_ref(document))?)?;
        let span = together.spans.iter().nth(place).unwrap_or_default();
        let rows = if by_token { span } else { place..place + 1 };
        let beside = &all[rows.start * width..rows.end * width];
        close(&format!("document {place} beside others"), beside, &alone, 1e-5)?;
    }
    Ok(())
}
