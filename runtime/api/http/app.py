"""The application: all routes, who may use them, and what a request may be."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from runtime.api.http import completions, control, errors, jobs, live
from runtime.api.http.auth import LOCAL, Gate, Scope, may
from runtime.api.http.backend import Backend, Backing
from runtime.api.http.limits import Limits
from runtime.api.http.metrics import CONTENT_TYPE
from runtime.config import Service
from runtime.jobs.journal import queries

_of_the_service = APIRouter(tags=["service"])


@_of_the_service.get("/health")
async def health() -> dict[str, str]:
    """Whether the process lives: it answers."""
    return {"status": "ok"}


@_of_the_service.get("/ready", responses={503: {"description": "why not"}})
async def ready(backing: Backing) -> JSONResponse:
    """Whether work can be done now."""
    why = backing.unready
    return JSONResponse({"status": "ready" if why is None else why}, 200 if why is None else 503)


@_of_the_service.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors.ERRORS},
    dependencies=[Depends(may(Scope.READ))],
)
async def metrics(backing: Backing) -> Response:
    """Figures for Prometheus."""
    counts = await backing.jobs.journal.read(queries.counts)
    return Response(backing.metrics.text(counts), media_type=CONTENT_TYPE)


def make(backend: Backend, gate: Gate, service: Service) -> FastAPI:
    """The application over a backend."""
    app = FastAPI(
        title="Troupe",
        version=_version(),
        description="A team of language models, each role on its own vLLM engine, on one GPU.",
        docs_url=None,  # they load their scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        strict_content_type=True,  # a form of another site cannot say that it is JSON
    )
    app.state.backend = backend
    app.state.gate = gate
    errors.register(app)
    for router in (completions.router, jobs.router, control.router, live.router, _of_the_service):
        app.include_router(router)
    app.mount("/page", StaticFiles(directory=live.PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(live.PAGE / "index.html")

    local = service.host in LOCAL
    hosts = tuple(dict.fromkeys((*LOCAL, *service.names))) if local else None
    app.add_middleware(Limits, body_bytes=service.body_max_bytes, gate=gate, per_s=service.requests_per_s, hosts=hosts)
    return app


def _version() -> str:
    try:
        return version("troupe-llm")
    except PackageNotFoundError:
        return "0"
