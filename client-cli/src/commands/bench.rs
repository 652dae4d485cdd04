//! `bench`: figures beside their floors.

use serde_json::{Value, json};

use crate::args::BenchArgs;
use crate::bench::{self, Figure, Name};
use crate::client::Client;
use crate::error::Error;
use crate::output::Answer;
use crate::session::Session;

/// Most guest memory of one benchmark: a tebibyte.
const MAX_SIZE: u64 = 1 << 40;

/// `mmuctl bench`.
pub(super) async fn run(
    session: &Session,
    client: &Client,
    args: &BenchArgs,
) -> Result<Answer, Error> {
    const PAGES: u64 = 2 << 20;
    if let Some(size) = args.size
        && (size == 0 || size % PAGES != 0 || size > MAX_SIZE)
    {
        return Err(Error::Usage(format!(
            "--size: {size:#x} is not a multiple of 2 MiB up to 1 TiB"
        )));
    }
    if args.plot.is_some() && args.name != Name::Growth {
        let reason = "--plot draws what bench growth measures";
        return Err(Error::Usage(reason.to_owned()));
    }
    // The benchmark's own host would hand out memory that another one has handed out already.
    if args.name == Name::Fault && !session.is_local() {
        let reason = "bench fault needs a module that nobody else uses: leave the URLs out";
        return Err(Error::Usage(reason.to_owned()));
    }
    // With the places of another service's configuration the figures would say nothing.
    if args.name == Name::Overload && !session.is_local() {
        let reason = "bench overload needs services with few places: leave the URLs out";
        return Err(Error::Usage(reason.to_owned()));
    }
    let memory = || session.memory();
    let figures = bench::run(session, client, &memory, args.plan()).await?;
    if let Some(path) = &args.plot {
        let lines = ["populate, ns a page", "conversion to shared, ns a page"];
        let drawing = bench::plot("What a page costs in TDs of growing size", lines, &figures);
        std::fs::write(path, drawing).map_err(|source| Error::Plot {
            file: path.clone(),
            source,
        })?;
    }
    let memory = memory();
    let list: Vec<Value> = figures
        .iter()
        .map(|figure| figure.to_json(memory))
        .collect();
    // The first figure is what the benchmark is named after: its members are the object's own.
    let mut json = list.first().cloned().unwrap_or_else(|| json!({}));
    if let Value::Object(members) = &mut json {
        members.insert("figures".into(), Value::Array(list));
        members.insert("repeats".into(), args.repeats.into());
        members.insert("warm_up".into(), args.warm_up.into());
    }
    Ok(Answer::new(json, Figure::table(&figures)))
}
