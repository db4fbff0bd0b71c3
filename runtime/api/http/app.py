"""The HTTP application: it combines all routes, error handlers and limits."""

from importlib.metadata import version

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from runtime.api.auth import Gate, Scope
from runtime.api.http import control, errors, jobs, live, openai_routes, openapi
from runtime.api.http.auth import LOCAL_HOSTS, require
from runtime.api.http.backend import Backend, BackendDep
from runtime.api.http.limits import Limits
from runtime.api.http.metrics import CONTENT_TYPE
from runtime.config import Service
from runtime.jobs.journal import queries

_service_router = APIRouter(tags=["service"])


@_service_router.get("/health")
async def health() -> dict[str, str]:
    """Return 200 if the process is alive, even while the engines start."""
    return {"status": "ok"}


@_service_router.get("/ready", responses={503: {"description": "The service cannot run work now; `status` says why."}})
async def ready(backend: BackendDep) -> JSONResponse:
    """Return 200 if the service can run work now, and 503 with the reason otherwise."""
    reason = backend.why_not_ready()
    return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)


@_service_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors.ERRORS},
    dependencies=[Depends(require(Scope.READ))],
)
async def metrics(backend: BackendDep) -> Response:
    """Return metrics in Prometheus' text format."""
    counts = await backend.jobs.journal.read(queries.counts)
    return Response(backend.metrics.text(counts, backend.jobs.ended), media_type=CONTENT_TYPE)


def create_app(backend: Backend, gate: Gate, service: Service) -> FastAPI:
    """Return the application that serves a backend."""
    app = FastAPI(
        title="Troupe",
        version=version("troupe-llm"),
        description="A team of language models that solve problems together, on vLLM engines that share a device.",
        # FastAPI's documentation pages load their scripts from another site.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        strict_content_type=True,  # an HTML form of another site cannot send application/json
    )
    app.state.backend = backend
    app.state.gate = gate
    errors.register(app)
    for router in (openai_routes.router, jobs.router, control.router, live.router, _service_router):
        app.include_router(router)
    openapi.add_route(app, list(backend.team.seats))
    app.mount("/page", StaticFiles(directory=live.PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(live.PAGE / "index.html")

    local = service.host in LOCAL_HOSTS
    hosts = tuple(dict.fromkeys((*LOCAL_HOSTS, *service.names))) if local else None
    app.add_middleware(
        Limits, body_max_bytes=service.body_max_bytes, gate=gate, per_s=service.requests_per_s, hosts=hosts
    )
    return app
