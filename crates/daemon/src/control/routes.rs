//! The routes of the control interface. `docs/control-api.md` describes them for users.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;

use super::{MAX_BODY_BYTES, metrics};
use crate::config::{Prepare, StorageOrder};
use crate::events::Event;
use crate::registry::{CommandError, Controlled, Exports};
use crate::status::ExportStatus;
use crate::verification::VerifyStatus;

/// What `GET /` answers.
const INDEX: &str = "\
hikkoshi control interface

GET  /v1/status                          all exports, a JSON array
GET  /v1/export?name=NAME                one export
GET  /v1/heat?name=NAME                  how much it is read and written where, a heat map
GET  /v1/events?name=NAME&since=N        what has happened to it, later than number N
GET  /metrics                            the numbers of all, for Prometheus
POST /v1/pause?name=NAME                 stop the background copy
POST /v1/resume?name=NAME                let it go on
POST /v1/limit?name=NAME&bytes_per_s=N   cap it, in bytes per second; none lifts the cap
POST /v1/limit-all?bytes_per_s=N         cap what all exports copy together; none lifts the cap
POST /v1/handoff?name=NAME               from here on the VM runs here
POST /v1/abort?name=NAME                 give the move here up, before the handoff
POST /v1/release?name=NAME&force=yes     lift the fence of an old copy
POST /v1/move?name=NAME&to=PATH          move the disk to another image here; clients stay
POST /v1/verify?name=NAME                compare with the source; &accept=yes lets it go anyway
GET  /v1/verify?name=NAME                how that stands

Without name: the default export, or the only one. A command answers with the export's status;
an error is {\"error\": \"...\"} with status 400, 404, 405, 409 or 500.
";

type Shared = Arc<dyn Exports>;

/// The routes over `exports`.
pub(super) fn router(exports: Shared) -> Router {
    Router::new()
        .route("/", get(async || INDEX))
        .route("/v1/status", get(status))
        .route("/v1/export", get(export))
        .route("/v1/heat", get(heat))
        .route("/v1/events", get(events))
        .route("/metrics", get(metrics))
        .route("/v1/pause", post(pause))
        .route("/v1/resume", post(resume))
        .route("/v1/handoff", post(handoff))
        .route("/v1/abort", post(abort))
        .route("/v1/release", post(release))
        .route("/v1/limit", post(limit))
        .route("/v1/limit-all", post(limit_all))
        .route("/v1/move", post(move_storage))
        .route("/v1/verify", get(verification).post(verify))
        .fallback(async || {
            Refusal::new(
                StatusCode::NOT_FOUND,
                "no such route; GET / lists those there are",
            )
        })
        .method_not_allowed_fallback(async || {
            Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this route is asked with another method; GET / lists the routes",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(exports)
}

/// The routes of the address for metrics alone: nothing can be commanded there.
pub(super) fn metrics_router(exports: Shared) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "there is only GET /metrics here"))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(exports)
}

/// An error answer.
struct Refusal {
    status: StatusCode,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.message }))).into_response()
    }
}

impl From<CommandError> for Refusal {
    fn from(error: CommandError) -> Self {
        let status = match error {
            CommandError::NoSuchExport(_) => StatusCode::NOT_FOUND,
            CommandError::Conflict(_) => StatusCode::CONFLICT,
            CommandError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

impl From<QueryRejection> for Refusal {
    fn from(error: QueryRejection) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error.body_text())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limit {
    #[serde(default)]
    name: String,
    bytes_per_s: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitAll {
    bytes_per_s: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Since {
    #[serde(default)]
    name: String,
    #[serde(default)]
    since: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Release {
    #[serde(default)]
    name: String,
    force: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Move {
    #[serde(default)]
    name: String,
    to: PathBuf,
    state: Option<PathBuf>,
    prepare: Option<String>,
    bytes_per_s: Option<String>,
    overwrite: Option<String>,
}

#[derive(Deserialize)]
struct Verify {
    #[serde(default)]
    name: String,
    accept: Option<String>,
}

type NameQuery = Result<Query<Name>, QueryRejection>;

async fn status(State(exports): State<Shared>) -> Json<Vec<ExportStatus>> {
    Json(exports.all().iter().map(|one| one.status()).collect())
}

async fn export(
    State(exports): State<Shared>,
    query: NameQuery,
) -> Result<Json<ExportStatus>, Refusal> {
    let Query(query) = query?;
    Ok(Json(exports.find(&query.name)?.status()))
}

/// The map as `docs/on-disk.md` has it: what `serve --heat` takes.
async fn heat(State(exports): State<Shared>, query: NameQuery) -> Result<Response, Refusal> {
    let Query(query) = query?;
    let map = exports.find(&query.name)?.heat().encode();
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], map).into_response())
}

async fn events(
    State(exports): State<Shared>,
    query: Result<Query<Since>, QueryRejection>,
) -> Result<Json<Vec<Event>>, Refusal> {
    let Query(query) = query?;
    Ok(Json(exports.find(&query.name)?.events(query.since)))
}

async fn metrics(State(exports): State<Shared>) -> impl IntoResponse {
    let all: Vec<ExportStatus> = exports.all().iter().map(|one| one.status()).collect();
    (
        [(header::CONTENT_TYPE, metrics::CONTENT_TYPE)],
        metrics::render(&all),
    )
}

async fn pause(
    State(exports): State<Shared>,
    query: NameQuery,
) -> Result<Json<ExportStatus>, Refusal> {
    let Query(query) = query?;
    command(exports, query.name, |export| export.pause()).await
}

async fn resume(
    State(exports): State<Shared>,
    query: NameQuery,
) -> Result<Json<ExportStatus>, Refusal> {
    let Query(query) = query?;
    command(exports, query.name, |export| export.resume()).await
}

async fn handoff(
    State(exports): State<Shared>,
    query: NameQuery,
) -> Result<Json<ExportStatus>, Refusal> {
    let Query(query) = query?;
    command(exports, query.name, |export| export.handoff()).await
}

async fn abort(
    State(exports): State<Shared>,
    query: NameQuery,
) -> Result<Json<ExportStatus>, Refusal> {
    let Query(query) = query?;
    command(exports, query.name, |export| export.abort()).await
}

async fn release(
    State(exports): State<Shared>,
    query: Result<Query<Release>, QueryRejection>,
) -> Result<Json<ExportStatus>, Refusal> {
    let Query(query) = query?;
    let force = said_yes("force", query.force.as_deref())?;
    command(exports, query.name, move |export| export.release(force)).await
}

/// A switch that is `yes` or left out.
fn said_yes(what: &str, said: Option<&str>) -> Result<bool, Refusal> {
    match said {
        None => Ok(false),
        Some("yes") => Ok(true),
        Some(other) => Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("{what} is {other:?}; it must be yes, or left out"),
        )),
    }
}

async fn limit(
    State(exports): State<Shared>,
    query: Result<Query<Limit>, QueryRejection>,
) -> Result<Json<ExportStatus>, Refusal> {
    let Query(query) = query?;
    let rate = said_rate(&query.bytes_per_s)?;
    command(exports, query.name, move |export| export.set_limit(rate)).await
}

async fn limit_all(
    State(exports): State<Shared>,
    query: Result<Query<LimitAll>, QueryRejection>,
) -> Result<Json<Vec<ExportStatus>>, Refusal> {
    let Query(query) = query?;
    exports.set_common_limit(said_rate(&query.bytes_per_s)?);
    Ok(status(State(exports)).await)
}

fn said_rate(text: &str) -> Result<Option<u64>, Refusal> {
    match text {
        "none" => Ok(None),
        text => match text.parse::<u64>() {
            Ok(rate) if rate > 0 => Ok(Some(rate)),
            _ => Err(bad(format!(
                "bytes_per_s is {text:?}; it must be a whole number above 0, or none (to stop the \
                 background copy, POST /v1/pause)"
            ))),
        },
    }
}

fn bad(why: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, why)
}

async fn move_storage(
    State(exports): State<Shared>,
    query: Result<Query<Move>, QueryRejection>,
) -> Result<Json<ExportStatus>, Refusal> {
    let Query(query) = query?;
    let relative = |path: &&PathBuf| !path.is_absolute();
    if let Some(path) = [Some(&query.to), query.state.as_ref()]
        .into_iter()
        .flatten()
        .find(relative)
    {
        let path = path.display();
        return Err(bad(format!("{path:?} must be an absolute path")));
    }
    let order = StorageOrder {
        image: query.to,
        state_dir: query.state,
        prepare: match query.prepare.as_deref() {
            None | Some("ahead") => Prepare::Ahead,
            Some("none") => Prepare::None,
            Some("full") => Prepare::Full,
            Some(other) => {
                return Err(bad(format!(
                    "prepare is {other:?}; it must be none, ahead or full"
                )));
            }
        },
        max_rate: query.bytes_per_s.as_deref().map_or(Ok(None), said_rate)?,
        overwrite: said_yes("overwrite", query.overwrite.as_deref())?,
    };
    command(exports, query.name, move |export| {
        export.move_storage(&order)
    })
    .await
}

async fn verification(
    State(exports): State<Shared>,
    query: NameQuery,
) -> Result<Json<VerifyStatus>, Refusal> {
    let Query(query) = query?;
    Ok(Json(exports.find(&query.name)?.verification()))
}

async fn verify(
    State(exports): State<Shared>,
    query: Result<Query<Verify>, QueryRejection>,
) -> Result<Json<VerifyStatus>, Refusal> {
    let Query(query) = query?;
    let accept = said_yes("accept", query.accept.as_deref())?;
    Ok(Json(exports.find(&query.name)?.verify(accept)?))
}

/// Runs a command, which may wait for a disk, on a thread where it may, and tells how the export
/// stands after it. Once begun, the command is carried out even if the client hangs up.
async fn command<F>(exports: Shared, name: String, act: F) -> Result<Json<ExportStatus>, Refusal>
where
    F: FnOnce(&dyn Controlled) -> Result<(), CommandError> + Send + 'static,
{
    let done = tokio::task::spawn_blocking(move || {
        let export = exports.find(&name)?;
        act(export.as_ref())?;
        Ok::<_, CommandError>(export.status())
    });
    match done.await {
        Ok(Ok(status)) => Ok(Json(status)),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the command ended abnormally; the daemon's log says more",
        )),
    }
}
